"""Turn a causal model into its step: a forward that takes the cache as tensors and writes it in place.

Inside :meth:`StaticMode.capture` the model's ``forward`` takes plain tensors alone and gives logits. So it is captured,
adapted and compiled as any other forward. Four sizes are free: rows, tokens (one, or a whole prompt), positions of the
cache, and tokens whose logits are wanted.

    input_ids       (batch, tokens)         int64
    inputs_embeds   (batch, tokens, width)  replace the tokens' embeddings where ``embedded`` is true
    embedded        ()                      bool; only models that take inputs_embeds have these two inputs
    deepstack       (batch, tokens, layers, width)  features added after the first layers, for Qwen3-VL with images
    last_keys       (batch, tokens)         int64: the last position that a token attends to, where that is after its
                                            own, for Gemma 3 with images
    attention_mask  (batch, length)         int64, of the cache; positions after a token are always masked
    position_ids    (batch, tokens)         int64; (batch, tokens, axes) for M-RoPE in prompts with images
    slots           (tokens,)               int64: the consecutive positions of the cache that the tokens go to
    keep            (kept,)                 int64: the indices of the tokens whose logits are wanted
    alora_acts      (batch, tokens)         bool: where an aLoRA adapter acts (see ``token_gates``)
    keys_i          (batch, heads, length, dim)  and values_i, for each layer; (batch, heads, ring, dim) for layers that
                                                 keep a sliding window (see ``sliding_window``)
    -> logits       (batch, kept, vocabulary)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.model_state import keyword_only_parameter
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.sliding_window import RingPositions

#: sizes of the example inputs: all different and none of them one, because torch would specialize on these
_ROWS, _TOKENS, _LENGTH, _KEPT, _RING = 3, 5, 11, 2, 7


#: the inputs of a step that images in its prompt have; both are zeros at text
DEEPSTACK, LAST_KEYS = "deepstack", "last_keys"


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSpec:
    """The sizes of a step program, and the inputs that it takes.

    ``layout`` is that of its cache. ``max_batch`` and ``max_length`` are the most rows and positions that a cache may
    have. ``takes_position_ids`` and ``takes_inputs_embeds`` say whether the step takes position_ids, and inputs_embeds.
    ``vocab_size`` is the number of tokens, ``hidden_size`` the size of their embeddings, ``embeds_dtype`` their dtype.
    ``mode_reason`` says why a better cache mode failed for the model; '' where none did.
    """

    layout: CacheLayout
    max_batch: int
    max_length: int
    takes_position_ids: bool
    takes_inputs_embeds: bool
    vocab_size: int
    hidden_size: int
    embeds_dtype: torch.dtype
    mode_reason: str = ""
    #: whether the program has a part that reads a prompt at once (see ``prefill_part``)
    has_prefill: bool = False
    #: why a mode that could have such a part has none
    prefill_reason: str = ""
    #: the axes along which tokens are numbered, 3 for M-RoPE; 0 where position_ids has one number for each token
    position_axes: int = 0
    #: the number of layers after which features of images are added to the hidden states (Qwen3-VL's deepstack)
    deepstack_layers: int = 0
    #: whether tokens of images attend to those after them (Gemma 3)
    looks_ahead: bool = False
    #: the token coefficients that a step takes, with a value for each of its tokens (see ``token_gates``)
    token_gate_inputs: tuple[str, ...] = ()

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs of a step that images in its prompt have."""
        return (*((DEEPSTACK,) if self.deepstack_layers else ()), *((LAST_KEYS,) if self.looks_ahead else ()))

    def image_zeros(self, name: str, rows: int, tokens: int, device: torch.device) -> Tensor:
        """Return one of :attr:`image_inputs` for tokens of text, without memory for each of them."""
        if name == LAST_KEYS:
            return torch.zeros(1, dtype=torch.int64, device=device).expand(rows, tokens)
        zero = torch.zeros(1, dtype=self.embeds_dtype, device=device)
        return zero.expand(rows, tokens, self.deepstack_layers, self.hidden_size)

    def step_positions(self, position_ids: Tensor) -> Tensor:
        """Return the position_ids of a step for those of a caller, (rows, tokens) or (axes, rows, tokens).

        They are (rows, tokens), and (rows, tokens, axes) where the step numbers tokens along several axes.
        """
        if self.position_axes == 0:
            return position_ids.contiguous()
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(self.position_axes, *position_ids.shape)
        return position_ids.permute(1, 2, 0).contiguous()


@dataclass(frozen=True)
class StepExample:
    """The example inputs of a step and their free sizes, for ``adaptc.compile(model, ..., example_inputs,
    dynamic_shapes)``.

    The model is captured with them inside of :meth:`CacheMode.capture`.
    """

    example_inputs: dict[str, Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Return the parameters of the step's forward: the inputs, all by keyword."""
        return list(map(keyword_only_parameter, self.example_inputs))


def find_cache_argument(model: nn.Module, *names: str) -> str:
    """Return the name of the argument that is a cache, of the forward of ``model``; one of ``names`` or the usual ones.

    Raises CaptureError where the forward takes no cache.
    """
    parameters = inspect.signature(model.forward).parameters
    found = next((n for n in ("cache", "past_key_values", *names) if n in parameters), None)
    if found is None:
        raise CaptureError(f"the forward of {type(model).__name__} takes no cache, so it cannot go on from one")
    return found


def equate_sizes(inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]) -> None:
    """Compare the free sizes that must be equal, so that torch's tracer learns at once that they are.

    Otherwise the first layer would teach it. That layer would then differ from the others, which are traced once where
    all are equal. Raises CaptureError where such sizes differ.
    """
    first: dict[int, tuple[str, Any]] = {}
    for name, axes in dynamic_shapes.items():
        for axis, dim in axes.items():
            size = inputs[name].shape[axis]
            other, like = first.setdefault(id(dim), (name, size))
            if size != like:
                raise CaptureError(f"axis {axis} of {name!r} has size {size}, but must be {like} as in {other!r}")


@contextlib.contextmanager
def replaced_embeddings(model: Any, inputs_embeds: Tensor | None, is_embedded: Tensor | None) -> Generator[None]:
    """Run the block with an input embedding that gives ``inputs_embeds`` where ``is_embedded`` is true."""
    if inputs_embeds is None or is_embedded is None:
        yield
        return

    def replace_rows(module: Any, args: Any, out: Tensor) -> Tensor:
        return torch.where(is_embedded, inputs_embeds.to(out.dtype), out)

    hook = model.get_input_embeddings().register_forward_hook(replace_rows)
    try:
        yield
    finally:
        hook.remove()


def example_step(
    model: Any,
    layout: CacheLayout,
    with_position_ids: bool,
    with_inputs_embeds: bool,
    size_limit: int | None = None,
    use_rings: bool = False,
) -> StepExample:
    """Return the example inputs of a step of ``model`` and their free sizes.

    ``size_limit`` bounds the positions of tokens and cache; None for any number. With ``use_rings``, sliding-window
    layers keep only their window.
    """
    device = next(model.parameters()).device
    rows, kept_dim = Dim("rows"), Dim("kept")
    tokens, length = (Dim(n) if size_limit is None else Dim(n, max=size_limit) for n in ("tokens", "length"))

    def arange(*shape: int) -> Tensor:
        return torch.arange(shape[-1], device=device).expand(shape).contiguous()

    inputs = {
        "input_ids": arange(_ROWS, _TOKENS),
        "attention_mask": torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device=device),
        "position_ids": arange(_ROWS, _TOKENS) + 2,
        "slots": arange(_TOKENS) + 2,
        "keep": arange(_KEPT) + 1,
    }
    shapes: dict[str, dict[int, Any]] = {
        "input_ids": {0: rows, 1: tokens},
        "attention_mask": {0: rows, 1: length},
        "position_ids": {0: rows, 1: tokens},
        "slots": {0: tokens},
        "keep": {0: kept_dim},
    }
    if not with_position_ids:
        del inputs["position_ids"], shapes["position_ids"]
    if with_inputs_embeds:
        weight = model.get_input_embeddings().weight
        inputs["inputs_embeds"] = torch.zeros(_ROWS, _TOKENS, weight.shape[1], dtype=weight.dtype, device=device)
        inputs["embedded"] = torch.zeros((), dtype=torch.bool, device=device)
        shapes |= {"inputs_embeds": {0: rows, 1: tokens}, "embedded": {}}
    places = Dim("ring")
    inputs |= layout.zeros(_ROWS, device, _LENGTH, _RING if use_rings else None)
    for name, sliding in zip(layout.names, layout.is_sliding, strict=True):
        shapes[name] = {0: rows, 2: places if use_rings and sliding else length}
    return StepExample(inputs, shapes)


def token_inputs(
    spec: StepSpec,
    device: torch.device,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    rows: int,
    tokens: int,
    of_images: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return tokens, or embeddings instead, as the inputs of a step, which has both where it takes embeddings.

    ``of_images`` are the ``spec.image_inputs`` by name; None for texts.
    """
    if input_ids is None:
        input_ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    out = {"input_ids": input_ids.to(device, torch.int64).contiguous()}
    if spec.takes_inputs_embeds:
        out["embedded"] = torch.tensor(inputs_embeds is not None, device=device)
        if inputs_embeds is None:
            inputs_embeds = torch.zeros(1, dtype=spec.embeds_dtype, device=device).expand(
                rows, tokens, spec.hidden_size
            )
        out["inputs_embeds"] = inputs_embeds.to(device, spec.embeds_dtype)
    for name in spec.image_inputs:
        zeros = spec.image_zeros(name, rows, tokens, device)
        out[name] = zeros if of_images is None else of_images[name].to(device, zeros.dtype)
    return out


def cache_over_tensors(tensors: list[Tensor], slots: Tensor, layout: CacheLayout, use_rings: bool = False) -> Any:
    """Return a transformers cache over ``tensors`` that writes at ``slots`` and shows all positions to attention.

    The model's mask hides the positions that a token may not attend to. With ``use_rings``, the tensors of
    sliding-window layers are rings.
    """
    from transformers.cache_utils import Cache

    pairs = zip(layout.layers, tensors[::2], tensors[1::2], strict=True)
    found = [(keys, values, slots, layer.sliding is not None) for layer, keys, values in pairs]
    layers = [written_layer_class()(*one, one[-1] and use_rings) for one in found]
    made = Cache(layers=layers)

    # Captures that copy equal layers ask by this which tensors and settings belong to layer i.
    def traced_layer(i: int) -> tuple[Any, tuple[bool, bool]]:
        return layers[i].given_tensors, (layers[i].is_sliding, layers[i].is_ring)

    vars(made)["traced_layer"] = traced_layer
    return made


@cache
def written_layer_class() -> type:
    """Return the class of layers of a transformers cache that :func:`cache_over_tensors` makes."""
    from transformers.cache_utils import StaticLayer

    layer_class: Any = StaticLayer  # its types leave out what is a tensor here

    class WrittenLayer(layer_class):
        """A layer of transformers' static cache over given tensors, written at given positions."""

        def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, is_sliding: bool, is_ring: bool) -> None:
            layer_class.__init__(self, keys.shape[2])
            self.keys, self.values, self.slots = keys, values, slots
            self.given_tensors = keys, values
            self.is_sliding, self.is_ring = is_sliding, is_ring
            self.cumulative_length = slots[0]
            self.device, self.is_initialized = keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = self.given_tensors
            where = torch.remainder(self.slots, self.max_cache_len) if self.is_ring else self.slots
            return keys.index_copy_(2, where, key_states), values.index_copy_(2, where, value_states)

        def get_mask_sizes(self, *args: Any) -> tuple[int, Any]:
            return self.max_cache_len, RingPositions.after_step(self.slots, self.max_cache_len) if self.is_ring else 0

        def get_seq_length(self) -> Tensor:
            return self.cumulative_length

    return WrittenLayer
