"""Describe the tensors of a model's cache, and how they are called as inputs of its step program.

The layout is found by running the model once. Attention layers have one pair of keys and values each; recurrent layers
have states. Any other cache raises CaptureError with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.capture.explain_failure import run_model
from adaptc.errors import AdaptcError, CaptureError, short_repr
from adaptc.passes.analysis.cache_inputs import KV_KINDS as KEY_VALUE_KINDS
from adaptc.passes.analysis.cache_inputs import STATE, cache_input_name, pass_prefix
from adaptc.torch_typing import to_python

#: the cache layers of transformers that keep keys and values, of all positions or of a sliding window
_ATTENTION_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
#: the cache layer of transformers that keeps the states of convolutions and recurrences
_STATE_LAYER = "LinearAttentionLayer"
STATE_KINDS = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class LayerLayout:
    """The sizes of one layer's keys (batch, ``heads``, length, ``key_dim``) and values (batch, ``heads``, length,
    ``value_dim``).

    ``sliding`` is the size of the layer's sliding window; None for full attention.
    """

    heads: int
    key_dim: int
    value_dim: int
    sliding: int | None = None


@dataclass(frozen=True)
class CacheLayout:
    """The keys and values that a step program takes, layer by layer.

    ``dtype`` is that of all its tensors, and their names begin with ``name_prefix``. ``passes`` is 1, plus 1 for each
    duplicated base pass that gives the adapter a last hidden state. The tensors of such a pass follow those of the
    program's own pass.
    """

    layers: tuple[LayerLayout, ...]
    dtype: torch.dtype
    name_prefix: str = ""
    passes: int = field(default=1, kw_only=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the inputs: keys and values in turn, layer by layer, one pass after another."""
        before = [pass_prefix(i) + self.name_prefix for i in range(self.passes)]
        return tuple(
            cache_input_name(kind, i, p) for p in before for i in range(len(self.layers)) for kind in KEY_VALUE_KINDS
        )

    def with_passes(self, passes: int) -> Self:
        """Return the layout of the same cache for a program with ``passes`` passes."""
        return replace(self, passes=passes)

    @property
    def sliding_window(self) -> int | None:
        """Return the size of the sliding window; None where no layer has one, or where their sizes differ."""
        found = {layer.sliding for layer in self.layers if layer.sliding is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """Return, for each of :attr:`names`, whether its layer has a sliding window."""
        return tuple(layer.sliding is not None for layer in self.layers for _ in range(2)) * self.passes

    def shapes(self, batch: int, length: int, ring: int | None = None) -> list[tuple[int, ...]]:
        """Return the shapes of the inputs, in the order of :attr:`names`.

        ``ring`` is the number of positions in the tensors of sliding-window layers; None where these have ``length``,
        too.
        """
        dims = [
            (layer.heads, length if ring is None or layer.sliding is None else ring, dim)
            for layer in self.layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        return [(batch, heads, places, dim) for heads, places, dim in dims * self.passes]

    def zeros(self, batch: int, device: torch.device, length: int = 0, ring: int | None = None) -> dict[str, Tensor]:
        """Return the inputs by name, filled with zeros."""
        shapes = zip(self.names, self.shapes(batch, length, ring), strict=True)
        return {name: torch.zeros(shape, dtype=self.dtype, device=device) for name, shape in shapes}

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        """Return the bytes of a cache of ``batch`` rows and ``length`` positions; ``ring`` as for :meth:`shapes`."""
        return sum(map(prod, self.shapes(batch, length, ring))) * self.dtype.itemsize

    @classmethod
    def from_model(cls, model: nn.Module) -> CacheLayout:
        """Return the layout of the cache that ``model`` makes of two tokens.

        Raises CaptureError where running the model fails, or where it gives another kind of cache.
        """
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        out = run_model(model, input_ids=ids, use_cache=True)
        return cls.from_cache(type(model).__name__, cache_from_output(out))

    @classmethod
    def from_cache(cls, model_name: str, cache: Any, name_prefix: str = "") -> CacheLayout:
        """Return the layout of ``cache``, which a model called ``model_name`` returned.

        Raises CaptureError for a cache of anything but keys and values, or states.
        """
        layers = getattr(cache, "layers", None)
        if not layers:
            raise CaptureError(f"{model_name} gives no cache of keys and values, so there is nothing to go on from")
        if all(type(layer).__name__ == _STATE_LAYER for layer in layers):
            return StateLayout.from_layers(layers)
        return cls(
            tuple(_layer_layout(model_name, i, layer) for i, layer in enumerate(layers)),
            layers[0].keys.dtype,
            name_prefix,
        )


@dataclass(frozen=True)
class State:
    """A state tensor (batch, *``sizes``) of a layer: number ``index`` among those of its ``kind``."""

    layer: int
    kind: str
    index: int
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StateLayout(CacheLayout):
    """The states that a step program of a recurrent model takes instead of keys and values, layer by layer."""

    states: tuple[State, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        before = [pass_prefix(i) + self.name_prefix for i in range(self.passes)]
        return tuple(cache_input_name(STATE, i, p) for p in before for i in range(len(self.states)))

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        return (False,) * len(self.names)

    def shapes(self, batch: int, length: int, ring: int | None = None) -> list[tuple[int, ...]]:
        return [(batch, *state.sizes) for state in self.states * self.passes]

    def zeros(self, batch: int, device: torch.device, length: int = 0, ring: int | None = None) -> dict[str, Tensor]:
        made = zip(self.names, self.states * self.passes, strict=True)
        return {name: torch.zeros(batch, *s.sizes, dtype=s.dtype, device=device) for name, s in made}

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        return batch * sum(prod(state.sizes) * state.dtype.itemsize for state in self.states * self.passes)

    def states_per_kind(self, layer: int) -> int:
        """Return the number of states of each kind in the layer ``layer``."""
        return 1 + max(state.index for state in self.states if state.layer == layer)

    @classmethod
    def from_layers(cls, layers: Sequence[Any]) -> StateLayout:
        """Return the layout of the layers of a transformers cache that a model wrote to."""
        states = tuple(
            State(i, kind, index, tuple(tensor.shape[1:]), tensor.dtype)
            for i, layer in enumerate(layers)
            for kind in STATE_KINDS
            for index, tensor in getattr(layer, kind).items()
            if tensor is not None
        )
        return cls((), states[0].dtype, states=states)


def cache_from_output(output: Any) -> Any:
    """Return the cache in a model's output, under the name that the installed transformers gives it; None for none."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def _layer_layout(name: str, index: int, layer: Any) -> LayerLayout:
    kind = type(layer).__name__
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if kind not in _ATTENTION_LAYERS or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise CaptureError(
            f"layer {index} of {name} keeps a {kind}, and generation is for models whose layers keep keys and values "
            "of their own"
        )
    window = layer.sliding_window if kind == "DynamicSlidingWindowLayer" else None
    return LayerLayout(keys.shape[1], keys.shape[-1], values.shape[-1], window)


def check_row_indices(indices: Any, rows: int) -> Tensor:
    """Return ``indices`` of rows of a cache that has ``rows`` rows.

    Raises AdaptcError for anything but a tensor (rows,) of int64 or int32 whose entries are rows of the cache.
    """
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        found = f"{tuple(indices.shape)} of {indices.dtype}" if isinstance(indices, Tensor) else short_repr(indices)
        raise AdaptcError(f"rows of a cache are chosen by a tensor (rows,) of int64, got {found}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        raise AdaptcError(f"the cache has {rows} rows, and rows {short_repr(to_python(indices))} are asked for")
    return indices
