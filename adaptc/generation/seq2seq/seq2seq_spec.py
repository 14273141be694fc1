"""Hold what is known of an encoder-decoder's program besides its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.seq2seq.seq2seq_step import CROSS, STATES, Encoded
from adaptc.generation.spec import GenerationSpec
from adaptc.tables import size

__all__ = ["CROSS", "Seq2SeqSpec", "check_side_by_side", "decoder_positions", "encoder_positions"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Seq2SeqSpec(GenerationSpec):
    """The facts of an encoder-decoder's program that its graph does not hold.

    ``main`` is the name of the encoder's input: tokens, or features of the shape ``features`` without the batch.
    ``source`` is the most tokens that the encoder reads; None for any number. ``cross`` is the layout of the
    cross-attention's keys and values. ``hidden`` is the width of the encoder's states. ``strides`` are those of
    whisper's convolutions.
    """

    main: str
    features: tuple[int, ...] | None
    source: int | None
    cross: CacheLayout
    hidden: int
    strides: tuple[int, int]

    @property
    def encoded(self) -> Encoded:
        """Return the description of the model's encoder with which it is captured."""
        return Encoded(self.main, self.features, self.strides, self.layout, self.cross)

    def notes(self) -> list[str]:
        states = size(self.cross.nbytes(1, 1))
        return [*super().notes(), f"cache of the encoder's states: {states} for each row and position"]

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Return the outputs of each part of the program, by the part's name."""
        return {"encode": [STATES], "cross": self.cross.names, "step": ["logits"]}


def decoder_positions(config: Any) -> int | None:
    """Return the number of positions that the decoder has; None where the config does not say."""
    return _number(config, "max_target_positions", "max_position_embeddings")


def encoder_positions(config: Any) -> int | None:
    """Return the number of positions that the encoder has; None where the config does not say."""
    return _number(config, "max_source_positions", "max_position_embeddings")


def _number(config: Any, *names: str) -> int | None:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)


def check_side_by_side(config: Any, name: str) -> None:
    """Raise CaptureError for a model that combines two models with configs of their own."""
    if getattr(config, "encoder", None) is not None and getattr(config, "decoder", None) is not None:
        raise CaptureError(f"{name} is put together of two models, and generation is for models that are one")
