"""Hold what is known of an encoder-decoder's program besides its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError, ConfigError
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.step_cache import as_transformers_cache
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache
from adaptc.generation.seq2seq.seq2seq_step import (
    CROSS_PREFIX,
    STATES,
    STATES_MASK,
    EncoderDescription,
    captured_as_seq2seq_step,
    decoder_inputs,
)
from adaptc.generation.spec import GenerationSpec
from adaptc.tables import format_bytes

__all__ = ["CROSS_PREFIX", "Seq2SeqSpec", "refuse_composite_model", "decoder_length", "encoder_length"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Seq2SeqSpec(GenerationSpec, EncoderDescription):
    """The spec of an encoder-decoder's program: what its graph does not hold.

    ``max_source_length`` is the most tokens that the encoder reads; None for any number. ``encoder_hidden_size`` is the
    width of its states.
    """

    max_source_length: int | None
    encoder_hidden_size: int

    def capture(self, model: nn.Module) -> AbstractContextManager[Any]:
        return captured_as_seq2seq_step(model, self)

    def new_cache(self, device: torch.device, prefix: CachePrefix | None = None) -> CrossCache:
        """Return a cache that holds nothing but ``prefix``.

        Raises ConfigError for rows with different numbers of virtual tokens, where the model takes no position_ids.
        """
        made: CrossCache = as_transformers_cache(CrossCache)(self.layout, self, self.max_length, device)
        if prefix is None:
            return made
        if not self.takes_position_ids and prefix.left_padding is not None and bool(prefix.left_padding.any()):
            raise ConfigError(
                f"the adapters of these rows put several numbers of tokens in front, up to {prefix.count}, and this "
                "model counts the positions of all rows alike: generate those of each number in a batch of their own"
            )
        made.start_with_prefix(prefix)
        return made

    def draw_inputs(self, draw: StepDraw, rows: int | None = None) -> dict[str, Tensor]:
        """Draw the inputs of all parts: a step, and independent rows for the encoder."""
        encoded_rows, decoder = rows, decoder_inputs(super().draw_inputs(draw, rows))
        rows = decoder["decoder_input_ids"].shape[0]
        encoded_rows = draw.size(1, draw.max_size) if encoded_rows is None else encoded_rows
        source_length, inputs = draw.size(1, 2 * draw.max_size), decoder
        if self.feature_shape is None:
            source_length = min(source_length, self.max_source_length or source_length)
            inputs[self.main_input_name] = draw.integers(self.vocab_size, (encoded_rows, source_length))
            inputs["attention_mask"] = torch.ones(encoded_rows, source_length, dtype=torch.int64)
            inputs[STATES_MASK] = torch.ones(rows, source_length, dtype=torch.int64)
        else:
            source_length = self.feature_shape[-1] // (self.conv_strides[0] * self.conv_strides[1])
            inputs[self.main_input_name] = draw.normal((encoded_rows, *self.feature_shape), self.embeds_dtype)
        dtype = self.cross_layout.dtype
        inputs[STATES] = draw.normal((rows, source_length, self.encoder_hidden_size), dtype)
        shapes = zip(self.cross_layout.names, self.cross_layout.shapes(rows, source_length), strict=True)
        return inputs | {name: draw.normal(shape, dtype) for name, shape in shapes}

    def notes(self) -> list[str]:
        states = format_bytes(self.cross_layout.nbytes(1, 1))
        return [*super().notes(), f"cache of the encoder's states: {states} for each row and position"]

    @property
    def part_outputs(self) -> Mapping[str, Sequence[str]]:
        """Return the outputs of each part of the program, by the part's name."""
        return {"encode": [STATES], "cross": self.cross_layout.names, "step": ["logits"]}


def decoder_length(config: Any) -> int | None:
    """Return the number of positions that the decoder has; None where the config does not say."""
    return _config_number(config, "max_target_positions", "max_position_embeddings")


def encoder_length(config: Any) -> int | None:
    """Return the number of positions that the encoder has; None where the config does not say."""
    return _config_number(config, "max_source_positions", "max_position_embeddings")


def _config_number(config: Any, *names: str) -> int | None:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)


def refuse_composite_model(config: Any, name: str) -> None:
    """Raise CaptureError for a model that combines two models with configs of their own."""
    if getattr(config, "encoder", None) is not None and getattr(config, "decoder", None) is not None:
        raise CaptureError(f"{name} is put together of two models, and generation is for models that are one")
