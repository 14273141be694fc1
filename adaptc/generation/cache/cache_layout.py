"""Describe the tensors of a model's cache, and how they are called as inputs of its step program.

The layout is found by running the model once. Attention layers have one pair of keys and values each; recurrent layers
have states. A layer of a hybrid model may have both, or nothing. Any other cache raises CaptureError with the reason.
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
#: the cache layers of transformers that keep such states beside keys and values
_HYBRID_LAYERS = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
#: the cache layer of transformers that keeps nothing
_EMPTY_LAYER = "DummyLayer"
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
        return tuple(name for prefix in before for name in self.pass_names(prefix))

    @property
    def is_state(self) -> tuple[bool, ...]:
        """Return, for each of :attr:`names`, whether it is a state, and not keys or values."""
        return (False,) * len(self.names)

    def pass_names(self, prefix: str) -> list[str]:
        """Return the names of one pass's inputs, which begin with ``prefix``."""
        return [cache_input_name(kind, i, prefix) for i in range(len(self.layers)) for kind in KEY_VALUE_KINDS]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the inputs, in the order of :attr:`names`."""
        return (self.dtype,) * len(self.names)

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
        return self.pass_shapes(batch, length, ring) * self.passes

    def pass_shapes(self, batch: int, length: int, ring: int | None) -> list[tuple[int, ...]]:
        """Return the shapes of one pass's inputs, in the order of :meth:`pass_names`."""
        return [
            (batch, layer.heads, length if ring is None or layer.sliding is None else ring, dim)
            for layer in self.layers
            for dim in (layer.key_dim, layer.value_dim)
        ]

    def zeros(self, batch: int, device: torch.device, length: int = 0, ring: int | None = None) -> dict[str, Tensor]:
        """Return the inputs by name, filled with zeros."""
        made = zip(self.names, self.shapes(batch, length, ring), self.dtypes, strict=True)
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape, dtype in made}

    def nbytes(self, batch: int, length: int, ring: int | None = None) -> int:
        """Return the bytes of a cache of ``batch`` rows and ``length`` positions; ``ring`` as for :meth:`shapes`."""
        sizes = zip(self.shapes(batch, length, ring), self.dtypes, strict=True)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in sizes)

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
        kinds = {type(layer).__name__ for layer in layers}
        if kinds == {_STATE_LAYER}:
            return StateLayout.from_layers(layers)
        if kinds & {_STATE_LAYER, *_HYBRID_LAYERS}:
            return HybridLayout.from_layers_of(model_name, layers)
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

    def pass_names(self, prefix: str) -> list[str]:
        return [cache_input_name(STATE, i, prefix) for i in range(len(self.states))]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(state.dtype for state in self.states) * self.passes

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        return (False,) * len(self.names)

    @property
    def is_state(self) -> tuple[bool, ...]:
        return (True,) * len(self.names)

    def pass_shapes(self, batch: int, length: int, ring: int | None) -> list[tuple[int, ...]]:
        return [(batch, *state.sizes) for state in self.states]

    @property
    def layer_numbers(self) -> range:
        """Return the numbers of the layers of the model's cache."""
        return range(self.states[-1].layer + 1)

    def states_per_kind(self, layer: int) -> int:
        """Return the number of states of each kind in the layer ``layer``."""
        return 1 + max(state.index for state in self.states if state.layer == layer)

    @classmethod
    def from_layers(cls, layers: Sequence[Any]) -> StateLayout:
        """Return the layout of the layers of a transformers cache that a model wrote to."""
        states = _states_of(layers)
        return cls((), states[0].dtype, states=states)


@dataclass(frozen=True)
class HybridLayout(StateLayout):
    """The keys and values, and the states, that a step program of a hybrid model takes.

    The model's cache has ``layer_count`` layers. Those numbered ``attention_layers`` keep the keys and values that
    ``layers`` describes; any may keep states, too, or nothing. The inputs of a pass are all keys and values, and then
    all states.
    """

    attention_layers: tuple[int, ...] = ()
    layer_count: int = 0

    def pass_names(self, prefix: str) -> list[str]:
        return [*CacheLayout.pass_names(self, prefix), *super().pass_names(prefix)]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        each = (*(self.dtype,) * (2 * len(self.layers)), *(state.dtype for state in self.states))
        return each * self.passes

    def pass_shapes(self, batch: int, length: int, ring: int | None) -> list[tuple[int, ...]]:
        return [
            *CacheLayout.pass_shapes(self, batch, length, ring),
            *super().pass_shapes(batch, length, ring),
        ]

    @property
    def is_state(self) -> tuple[bool, ...]:
        return (*(False,) * (2 * len(self.layers)), *(True,) * len(self.states)) * self.passes

    @property
    def layer_numbers(self) -> range:
        return range(self.layer_count)

    @classmethod
    def from_layers_of(cls, model_name: str, layers: Sequence[Any]) -> HybridLayout:
        """Return the layout of the layers of a transformers cache that a model called ``model_name`` wrote to.

        Raises CaptureError for a layer that keeps anything but keys and values, or states.
        """
        found: dict[int, LayerLayout] = {}
        for i, layer in enumerate(layers):
            kind, has_keys = type(layer).__name__, isinstance(getattr(layer, "keys", None), Tensor)
            if has_keys or kind not in (_STATE_LAYER, _EMPTY_LAYER, *_HYBRID_LAYERS):
                found[i] = _layer_layout(model_name, i, layer)
        states = _states_of(layers)
        if not found or not states:
            raise CaptureError(f"the cache of {model_name} has keys and values alone, or states, in layers for both")
        dtype = layers[next(iter(found))].keys.dtype
        numbers = tuple(found)
        return cls(tuple(found.values()), dtype, states=states, attention_layers=numbers, layer_count=len(layers))


def _states_of(layers: Sequence[Any]) -> tuple[State, ...]:
    return tuple(
        State(i, kind, index, tuple(tensor.shape[1:]), tensor.dtype)
        for i, layer in enumerate(layers)
        for kind in STATE_KINDS
        for index, tensor in getattr(layer, kind, {}).items()
        if tensor is not None
    )


def cache_from_output(output: Any) -> Any:
    """Return the cache in a model's output, under the name that the installed transformers gives it; None for none."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def _layer_layout(name: str, index: int, layer: Any) -> LayerLayout:
    kind = type(layer).__name__
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    is_known = kind in (*_ATTENTION_LAYERS, *_HYBRID_LAYERS)
    if not is_known or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise CaptureError(
            f"layer {index} of {name} keeps a {kind}, and generation is for models whose layers keep keys and values "
            "of their own"
        )
    window = layer.sliding_window if "SlidingWindow" in kind else None
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
