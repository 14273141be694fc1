"""Turn an encoder-decoder into its step: three parts of one program, which share nothing but weights.

Inside :func:`stepping_across` the model's ``forward`` takes plain tensors alone and gives the results of all parts by
name. One program is captured, adapted, swapped and saved as any other. Calls run one part of it at a time
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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.explain_failure import run_model
from adaptc.capture.model_state import keyword, replaced_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, cache_of
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import Step, example_step, learn_sizes, written_cache

STATES, MASK = "states", "states_mask"
#: the prefix of the names of the cross-attention's keys and values
CROSS = "cross_"
#: sizes of the example inputs, different from those of the step's
_SOURCES, _READ, _POSITIONS = 4, 7, 9


@dataclass(frozen=True)
class Encoded:
    """A description of what a model's encoder reads, and of the decoder's caches.

    ``main`` is the name of its input: tokens (batch, length), or features of the fixed shape (batch, *``features``).
    ``strides`` are those of whisper's convolutions, which shorten the features. ``own`` is the layout of the decoder's
    own cache, ``cross`` that of the cross-attention.
    """

    main: str
    features: tuple[int, ...] | None
    strides: tuple[int, int]
    own: CacheLayout
    cross: CacheLayout

    def example(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.features is None:
            return torch.arange(_READ, device=device).expand(rows, _READ).contiguous()
        return torch.zeros(rows, *self.features, dtype=dtype, device=device)

    @classmethod
    def of(cls, model: nn.Module) -> Encoded:
        """Return the description that running ``model`` once gives.

        Raises CaptureError for a model whose encoder reads anything but tokens or whisper's features, or whose cache
        has anything but keys and values.
        """
        name, main = type(model).__name__, str(getattr(model, "main_input_name", ""))
        features: tuple[int, ...] | None = None
        strides = 1, 1
        if main == "input_features" and hasattr(model.config, "num_mel_bins"):
            encoder: Any = model.get_encoder()  # type: ignore[operator]
            strides = encoder.conv1.stride[0], encoder.conv2.stride[0]
            frames = strides[0] * strides[1] * model.config.max_source_positions  # type: ignore[union-attr]
            features = model.config.num_mel_bins, frames  # type: ignore[union-attr]
        elif main != "input_ids":
            raise CaptureError(f"the encoder of {name} reads {main}, and generation is for tokens and for whisper")
        bare = cls(main, features, strides, CacheLayout((), torch.float32), CacheLayout((), torch.float32))
        first = next(model.parameters())
        ids = torch.zeros(1, 2, dtype=torch.int64, device=first.device)
        source = {main: bare.example(1, first.device, first.dtype)}
        out = run_model(model, **source, decoder_input_ids=ids, use_cache=True)
        found = cache_of(out)
        own, cross = (getattr(found, f"{which}_attention_cache", None) for which in ("self", "cross"))
        return cls(main, features, strides, CacheLayout.of_cache(name, own), CacheLayout.of_cache(name, cross, CROSS))


@contextlib.contextmanager
def stepping_across(model: nn.Module, encoded: Encoded) -> Iterator[Step]:
    """Run the block with ``model`` as its three parts; its own forward is restored afterwards.

    Raises CaptureError for a model whose forward takes no cache, or no ``encoder_outputs``.
    """
    takes = inspect.signature(model.forward).parameters
    past = next((n for n in ("cache", "past_key_values") if n in takes), None)
    if past is None or "encoder_outputs" not in takes:
        raise CaptureError(f"the forward of {type(model).__name__} takes no cache, so it cannot go on from one")
    step = _example(model, encoded, with_positions="decoder_position_ids" in takes)
    original, encoder = model.forward, model.get_encoder()  # type: ignore[operator]

    def forward(**inputs: Any) -> dict[str, Tensor]:
        learn_sizes(inputs, step.dynamic_shapes)
        slots, keep, states = inputs.pop("slots"), inputs.pop("keep"), inputs.pop(STATES)
        own = [inputs.pop(n) for n in encoded.own.names]
        cross = [inputs.pop(n) for n in encoded.cross.names]
        read = {name: inputs.pop(name) for name in (encoded.main, "attention_mask") if name in inputs}
        found = encoder(**read)[0]
        seen = _crossing(cross)
        inputs[past] = _both(written_cache(own, slots, encoded.own), seen)
        inputs["attention_mask"] = inputs.pop(MASK, None)
        logits = original(encoder_outputs=(states,), **inputs, use_cache=True).logits
        made = [t for layer in seen.layers for t in layer.made]
        return {STATES: found, **dict(zip(encoded.cross.names, made, strict=True)), "logits": logits[:, keep]}

    with replaced_forward(model, forward, list(map(keyword, step.example_inputs))), packed_attention():
        yield step


def _example(model: nn.Module, encoded: Encoded, with_positions: bool) -> Step:
    first = next(model.parameters())
    device = first.device
    sources, read, positions = (Dim(n) for n in ("sources", "read", "positions"))
    decoder = example_step(model, encoded.own, with_positions, False)
    renamed = {"input_ids", "attention_mask", "position_ids"}
    inputs = {f"decoder_{n}" if n in renamed else n: t for n, t in decoder.example_inputs.items()}
    shapes = {f"decoder_{n}" if n in renamed else n: s for n, s in decoder.dynamic_shapes.items()}
    decoded, rows = inputs["decoder_input_ids"].shape[0], shapes["decoder_input_ids"][0]
    inputs[encoded.main] = encoded.example(_SOURCES, device, first.dtype)
    shapes[encoded.main] = {0: sources} if encoded.features else {0: sources, 1: read}
    if not encoded.features:
        inputs["attention_mask"] = torch.ones(_SOURCES, _READ, dtype=torch.int64, device=device)
        shapes["attention_mask"] = {0: sources, 1: read}
        inputs[MASK] = torch.ones(decoded, _POSITIONS, dtype=torch.int64, device=device)
        shapes[MASK] = {0: rows, 1: positions}
    width = run_model(model.get_encoder(), inputs[encoded.main])[0].shape[-1]  # type: ignore[operator]
    inputs[STATES] = torch.zeros(decoded, _POSITIONS, width, dtype=encoded.cross.dtype, device=device)
    shapes[STATES] = {0: rows, 1: positions}
    for name, shape in zip(encoded.cross.names, encoded.cross.shapes(decoded, _POSITIONS), strict=True):
        inputs[name] = torch.zeros(shape, dtype=encoded.cross.dtype, device=device)
        shapes[name] = {0: rows, 2: positions}
    return Step(inputs, shapes)


def _crossing(tensors: list[Tensor]) -> Any:
    from transformers.cache_utils import Cache

    return Cache(layers=[_layer_class()(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)])


def _both(own: Any, cross: Any) -> Any:
    from transformers.cache_utils import EncoderDecoderCache

    return EncoderDecoderCache(own, cross)


@cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class CrossLayer(DynamicLayer):
        """A cache layer that shows the keys and values it was made with, and notes those that the model computes
        now."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.held, self.made = (keys, values), (keys, values)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.made = key_states, value_states
            return self.held

        def get_seq_length(self) -> int:
            return 0  # so that the model computes its own keys and values

    return CrossLayer
