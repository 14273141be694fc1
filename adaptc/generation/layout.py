"""What the cache of a model consists of: which tensors, and how they are called as inputs of its step program.

Before: a causal transformers model. After: a layout with one pair of keys and values for each layer that has its own,
found by running the model once; or an error that says why the model's state is no such cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.capture.failures import run_model
from adaptc.errors import CaptureError
from adaptc.passes.analysis.cache_inputs import KINDS as CACHED
from adaptc.passes.analysis.cache_inputs import STATE, cache_name, pass_prefix

#: the classes of transformers whose state is keys and values at all positions, or at the last ones
_ATTENTION = ("DynamicLayer", "DynamicSlidingWindowLayer")
#: the one whose state is that of convolutions and recurrences
_STATE = "LinearAttentionLayer"
KINDS = ("conv_states", "recurrent_states")


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
    """The cache of a step program. ``dtype`` is that of all its tensors; their names begin with ``prefix``.
    ``passes``: one more than 1 for each pass in which the program computes its last hidden state first, whose tensors
    stand behind those of its own pass."""

    layers: tuple[LayerLayout, ...]
    dtype: torch.dtype
    prefix: str = ""
    passes: int = field(default=1, kw_only=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, keys and values by turns, layer by layer."""
        before = [pass_prefix(i) + self.prefix for i in range(self.passes)]
        return tuple(cache_name(kind, i, p) for p in before for i in range(len(self.layers)) for kind in CACHED)

    def of_passes(self, passes: int) -> Self:
        """The same of a program with so many."""
        return replace(self, passes=passes)

    @property
    def window(self) -> int | None:
        """What its sliding layers look back on; None where there are none, or it is not the same for all."""
        found = {layer.sliding for layer in self.layers if layer.sliding is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each of :attr:`names`, whether its layer is one of these."""
        return tuple(layer.sliding is not None for layer in self.layers for _ in range(2)) * self.passes

    def shapes(self, batch: int, length: int, ring: int | None = None) -> list[tuple[int, ...]]:
        """Of the inputs, in the order of :attr:`names`. ``ring``: places of those of sliding layers, where they have
        fewer than there are positions."""
        dims = [
            (layer.heads, length if ring is None or layer.sliding is None else ring, dim)
            for layer in self.layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        return [(batch, heads, places, dim) for heads, places, dim in dims * self.passes]

    def zeros(self, batch: int, device: torch.device, length: int = 0, ring: int | None = None) -> dict[str, Tensor]:
        """Such inputs, with nothing in them."""
        shapes = zip(self.names, self.shapes(batch, length, ring), strict=True)
        return {name: torch.zeros(shape, dtype=self.dtype, device=device) for name, shape in shapes}

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        """What a cache of so many rows and positions takes."""
        return sum(map(prod, self.shapes(batch, length, ring))) * self.dtype.itemsize

    @classmethod
    def of(cls, model: nn.Module) -> CacheLayout:
        """Runs ``model`` on two tokens. Raises CaptureError where it fails, or its state is something else."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        out = run_model(model, input_ids=ids, use_cache=True)
        return cls.of_cache(type(model).__name__, cache_of(out))

    @classmethod
    def of_cache(cls, name: str, found: Any, prefix: str = "") -> CacheLayout:
        """That of a cache which a model called ``name`` gave. Raises CaptureError for one of something else."""
        layers = getattr(found, "layers", None)
        if not layers:
            raise CaptureError(f"{name} gives no cache of keys and values, so there is nothing to go on from")
        if all(type(layer).__name__ == _STATE for layer in layers):
            return StateLayout.of_layers(layers)
        return cls(tuple(_layer(name, i, layer) for i, layer in enumerate(layers)), layers[0].keys.dtype, prefix)


@dataclass(frozen=True)
class State:
    """A tensor (batch, *``sizes``): the one numbered ``index`` of its ``kind`` in a layer."""

    layer: int
    kind: str
    index: int
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StateLayout(CacheLayout):
    """Of a model whose layers keep states, layer by layer, instead of keys and values."""

    states: tuple[State, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        before = [pass_prefix(i) + self.prefix for i in range(self.passes)]
        return tuple(cache_name(STATE, i, p) for p in before for i in range(len(self.states)))

    @property
    def sliding(self) -> tuple[bool, ...]:
        return (False,) * len(self.names)

    def shapes(self, batch: int, length: int, ring: int | None = None) -> list[tuple[int, ...]]:
        return [(batch, *state.sizes) for state in self.states * self.passes]

    def zeros(self, batch: int, device: torch.device, length: int = 0, ring: int | None = None) -> dict[str, Tensor]:
        made = zip(self.names, self.states * self.passes, strict=True)
        return {name: torch.zeros(batch, *s.sizes, dtype=s.dtype, device=device) for name, s in made}

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        return batch * sum(prod(state.sizes) * state.dtype.itemsize for state in self.states * self.passes)

    def kept_by(self, layer: int) -> int:
        """States of each kind in a layer."""
        return 1 + max(state.index for state in self.states if state.layer == layer)

    @classmethod
    def of_layers(cls, layers: Sequence[Any]) -> StateLayout:
        """That of layers of transformers' cache that a model wrote to."""
        states = tuple(
            State(i, kind, index, tuple(tensor.shape[1:]), tensor.dtype)
            for i, layer in enumerate(layers)
            for kind in KINDS
            for index, tensor in getattr(layer, kind).items()
            if tensor is not None
        )
        return cls((), states[0].dtype, states=states)


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
