"""Hold what is known of an encoder-decoder's program besides its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.seq2seq.seq2seq_step import CROSS_PREFIX, STATES, EncoderDescription
from adaptc.generation.spec import GenerationSpec
from adaptc.tables import format_bytes

__all__ = ["CROSS_PREFIX", "Seq2SeqSpec", "refuse_composite_model", "decoder_length", "encoder_length"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Seq2SeqSpec(GenerationSpec):
    """The spec of an encoder-decoder's program: what its graph does not hold.

    ``main_input_name`` is the name of the encoder's input: tokens, or features of the shape ``feature_shape`` without
    the batch. ``max_source_length`` is the most tokens that the encoder reads; None for any number. ``cross`` is the
    layout of the cross-attention's keys and values. ``encoder_hidden_size`` is the width of the encoder's states.
    ``conv_strides`` are those of whisper's convolutions.
    """

    main_input_name: str
    feature_shape: tuple[int, ...] | None
    max_source_length: int | None
    cross_layout: CacheLayout
    encoder_hidden_size: int
    conv_strides: tuple[int, int]

    @property
    def encoder_description(self) -> EncoderDescription:
        """Return the description of the model's encoder with which it is captured."""
        return EncoderDescription(
            self.main_input_name, self.feature_shape, self.conv_strides, self.layout, self.cross_layout
        )

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
