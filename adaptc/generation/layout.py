"""What the cache of a model consists of: which tensors, and how they are called as inputs of its step program.

Before: a causal transformers model. After: a layout with one pair of keys and values for each layer that has its own,
found by running the model once; or an error that says why the model's state is no such cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError

#: the classes of transformers whose state is keys and values at all positions, or at the last ones
_ATTENTION = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class LayerLayout:
    """Keys are (batch, ``heads``, length, ``key_dim``), values (batch, ``heads``, length, ``value_dim``). ``sliding``:
    positions that the layer looks back on; None for all."""

    heads: int
    key_dim: int
    value_dim: int
    sliding: int | None = None


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a step program. ``dtype`` is that of all its tensors; their names begin with ``prefix``."""

    layers: tuple[LayerLayout, ...]
    dtype: torch.dtype
    prefix: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, keys and values by turns, layer by layer."""
        return tuple(f"{self.prefix}{what}_{i}" for i in range(len(self.layers)) for what in ("keys", "values"))

    @property
    def window(self) -> int | None:
        """What its sliding layers look back on; None where there are none, or it is not the same for all."""
        found = {layer.sliding for layer in self.layers if layer.sliding is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each of :attr:`names`, whether its layer is one of these."""
        return tuple(layer.sliding is not None for layer in self.layers for _ in range(2))

    def shapes(self, batch: int, length: int, ring: int | None = None) -> list[tuple[int, int, int, int]]:
        """Of the inputs, in the order of :attr:`names`. ``ring``: places of those of sliding layers, where they have
        fewer than there are positions."""
        dims = [
            (layer.heads, length if ring is None or layer.sliding is None else ring, dim)
            for layer in self.layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        return [(batch, heads, places, dim) for heads, places, dim in dims]

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        """What a cache of so many rows and positions takes."""
        return sum(b * h * n * d for b, h, n, d in self.shapes(batch, length, ring)) * self.dtype.itemsize

    @classmethod
    def of(cls, model: nn.Module) -> CacheLayout:
        """Runs ``model`` on two tokens. Raises CaptureError for a model whose state is something else."""
        with eval_mode(model), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
            out = model(input_ids=ids, use_cache=True)
        return cls.of_cache(type(model).__name__, cache_of(out))

    @classmethod
    def of_cache(cls, name: str, found: Any, prefix: str = "") -> CacheLayout:
        """That of a cache which a model called ``name`` gave. Raises CaptureError for one of something else."""
        layers = getattr(found, "layers", None)
        if not layers:
            raise CaptureError(f"{name} gives no cache of keys and values, so there is nothing to go on from")
        return cls(tuple(_layer(name, i, layer) for i, layer in enumerate(layers)), layers[0].keys.dtype, prefix)


def cache_of(output: Any) -> Any:
    """The cache in a model's output, under the name that this release of transformers has for it."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def _layer(name: str, index: int, layer: Any) -> LayerLayout:
    kind = type(layer).__name__
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if kind not in _ATTENTION or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise CaptureError(
            f"layer {index} of {name} keeps a {kind}, and generation is for models whose layers keep keys and values "
            "of their own"
        )
    window = layer.sliding_window if kind == "DynamicSlidingWindowLayer" else None
    return LayerLayout(keys.shape[1], keys.shape[-1], values.shape[-1], window)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and the model's modes as they were afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
