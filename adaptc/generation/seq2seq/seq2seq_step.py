"""Turn an encoder-decoder into its step: three parts of one program, which share nothing but weights.

Inside :func:`captured_as_seq2seq_step` the model's ``forward`` takes plain tensors alone and gives the results of all
parts by name. One program is captured, adapted, swapped and saved as any other. Calls run one part of it at a time
(``adaptc.state.program_parts``).

    encode   the encoder's input, and its mask               -> states (batch, positions, hidden)
    cross    states                                          -> cross_keys_i, cross_values_i, of each layer
    step     the inputs of a decoder's step (see ``step``),  -> logits
             states_mask (batch, positions), cross_keys_i, cross_values_i

The cross-attention's keys and values are outputs of one part and inputs of another, so they are computed once per
generation. The number of encoded rows is independent of the number of decoded rows: beams share one encoding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.explain_failure import run_model
from adaptc.capture.model_state import patch_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, cache_from_output
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import (
    StepExample,
    cache_over_tensors,
    equate_sizes,
    example_step,
    find_cache_argument,
)

STATES, STATES_MASK = "states", "states_mask"
#: the prefix of the names of the cross-attention's keys and values
CROSS_PREFIX = "cross_"
#: the inputs of a step whose names begin with "decoder_" where there is an encoder, too
_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
T = TypeVar("T")
#: sizes of the example inputs, different from those of the step's
_ENCODED_ROWS, _SOURCE_LENGTH, _STATES_LENGTH = 4, 7, 9


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderDescription:
    """A description of what a model's encoder reads, and of the decoder's caches.

    ``main_input_name`` is the name of its input: tokens (batch, length), or features of the fixed shape (batch,
    *``feature_shape``). ``conv_strides`` are those of whisper's convolutions, which shorten the features. ``layout`` is
    the layout of the decoder's own cache, ``cross_layout`` that of the cross-attention.
    """

    layout: CacheLayout
    main_input_name: str
    feature_shape: tuple[int, ...] | None
    conv_strides: tuple[int, int]
    cross_layout: CacheLayout

    def example_input(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.feature_shape is None:
            return torch.arange(_SOURCE_LENGTH, device=device).expand(rows, _SOURCE_LENGTH).contiguous()
        return torch.zeros(rows, *self.feature_shape, dtype=dtype, device=device)

    @classmethod
    def from_model(cls, model: nn.Module) -> EncoderDescription:
        """Return the description that running ``model`` once gives.

        Raises CaptureError for a model whose encoder reads anything but tokens or whisper's features, or whose cache
        has anything but keys and values.
        """
        model_name, main_input_name = type(model).__name__, str(getattr(model, "main_input_name", ""))
        feature_shape: tuple[int, ...] | None = None
        conv_strides: tuple[int, int] = 1, 1
        if main_input_name == "input_features" and hasattr(model.config, "num_mel_bins"):
            whisper: Any = model
            encoder = whisper.get_encoder()
            conv_strides = encoder.conv1.stride[0], encoder.conv2.stride[0]
            frames = conv_strides[0] * conv_strides[1] * model.config.max_source_positions  # type: ignore[union-attr]
            feature_shape = model.config.num_mel_bins, frames  # type: ignore[union-attr]
        elif main_input_name != "input_ids":
            raise CaptureError(
                f"the encoder of {model_name} reads {main_input_name}, and generation is for tokens and for whisper"
            )
        empty, first = CacheLayout((), torch.float32), next(model.parameters())
        made = cls(
            layout=empty,
            main_input_name=main_input_name,
            feature_shape=feature_shape,
            conv_strides=conv_strides,
            cross_layout=empty,
        )
        ids = torch.zeros(1, 2, dtype=torch.int64, device=first.device)
        source = {main_input_name: made.example_input(1, first.device, first.dtype)}
        found = cache_from_output(run_model(model, **source, decoder_input_ids=ids, use_cache=True))
        own, cross = (getattr(found, f"{which}_attention_cache", None) for which in ("self", "cross"))
        return replace(
            made,
            layout=CacheLayout.from_cache(model_name, own),
            cross_layout=CacheLayout.from_cache(model_name, cross, CROSS_PREFIX),
        )


@contextlib.contextmanager
def captured_as_seq2seq_step(model: nn.Module, description: EncoderDescription) -> Generator[StepExample]:
    """Run the block with ``model`` as its three parts; its own forward is restored afterwards.

    Raises CaptureError for a model whose forward takes no cache, or no ``encoder_outputs``.
    """
    from transformers.cache_utils import Cache, EncoderDecoderCache

    cache_argument, takes = find_cache_argument(model), inspect.signature(model.forward).parameters
    if "encoder_outputs" not in takes:
        raise CaptureError(f"the forward of {type(model).__name__} takes no encoder_outputs")
    step = _example_step(model, description, with_position_ids="decoder_position_ids" in takes)
    untyped: Any = model
    original, encoder = model.forward, untyped.get_encoder()

    def forward(**inputs: Any) -> dict[str, Tensor]:
        equate_sizes(inputs, step.dynamic_shapes)
        slots, keep, states = inputs.pop("slots"), inputs.pop("keep"), inputs.pop(STATES)
        own = [inputs.pop(n) for n in description.layout.names]
        cross = [inputs.pop(n) for n in description.cross_layout.names]
        read = {name: inputs.pop(name) for name in (description.main_input_name, "attention_mask") if name in inputs}
        found = encoder(**read)[0]
        pairs = zip(cross[::2], cross[1::2], strict=True)
        layers = [_cross_layer_class()(*pair) for pair in pairs]
        own_cache = cache_over_tensors(own, slots, description.layout)
        inputs[cache_argument] = EncoderDecoderCache(own_cache, Cache(layers=layers))
        inputs["attention_mask"] = inputs.pop(STATES_MASK, None)
        logits = original(encoder_outputs=(states,), **inputs, use_cache=True).logits
        made = [t for layer in layers for t in layer.new_tensors]
        return {
            STATES: found,
            **dict(zip(description.cross_layout.names, made, strict=True)),
            "logits": logits[:, keep],
        }

    with patch_forward(model, forward, step.parameters), packed_attention():
        yield step


def decoder_inputs(inputs: Mapping[str, T]) -> dict[str, T]:
    """Return what belongs to the inputs of a causal model's step, under the names of the decoder's inputs."""
    return {f"decoder_{n}" if n in _DECODER_INPUTS else n: v for n, v in inputs.items()}


def _example_step(model: nn.Module, description: EncoderDescription, with_position_ids: bool) -> StepExample:
    first, name, cross = next(model.parameters()), description.main_input_name, description.cross_layout
    device, dtype = first.device, cross.dtype
    encoded_rows, source_length, positions = (Dim(n) for n in ("sources", "read", "positions"))
    decoder = example_step(model, description.layout, with_position_ids, False)
    inputs, shapes = decoder_inputs(decoder.example_inputs), decoder_inputs(decoder.dynamic_shapes)
    decoded_rows, rows = inputs["decoder_input_ids"].shape[0], shapes["decoder_input_ids"][0]
    inputs[name], shapes[name] = description.example_input(_ENCODED_ROWS, device, first.dtype), {0: encoded_rows}
    if not description.feature_shape:
        inputs["attention_mask"] = torch.ones(_ENCODED_ROWS, _SOURCE_LENGTH, dtype=torch.int64, device=device)
        inputs[STATES_MASK] = torch.ones(decoded_rows, _STATES_LENGTH, dtype=torch.int64, device=device)
        shapes[name] = shapes["attention_mask"] = {0: encoded_rows, 1: source_length}
        shapes[STATES_MASK] = {0: rows, 1: positions}
    width = run_model(model.get_encoder(), inputs[name])[0].shape[-1]  # type: ignore[operator]
    inputs[STATES] = torch.zeros(decoded_rows, _STATES_LENGTH, width, dtype=dtype, device=device)
    inputs |= cross.zeros(decoded_rows, device, _STATES_LENGTH)
    shapes |= {STATES: {0: rows, 1: positions}} | {key: {0: rows, 2: positions} for key in cross.names}
    return StepExample(inputs, shapes)


@cache
def _cross_layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    layer_class: Any = DynamicLayer  # its __init__ has no types

    class CrossLayer(layer_class):
        """A cache layer that shows the keys and values it was made with, and notes those that the model computes
        now."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            layer_class.__init__(self)
            self.given_tensors, self.new_tensors = (keys, values), (keys, values)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.new_tensors = key_states, value_states
            return self.given_tensors

        def get_seq_length(self) -> int:
            return 0  # so that the model computes its own keys and values

    return CrossLayer
