"""What is known of the program of an encoder-decoder beside its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import CaptureError
from adaptc.generation.cross_step import CROSS, STATES, Encoded
from adaptc.generation.facts import Facts
from adaptc.generation.layout import CacheLayout
from adaptc.tables import size

__all__ = ["CROSS", "CrossFacts", "check_side_by_side", "decoder_positions", "encoder_positions"]


@dataclass(frozen=True, eq=False, kw_only=True)
class CrossFacts(Facts):
    """``main``: the name of what the encoder reads, tokens or features of the shape ``features`` (without the batch);
    ``source``: how many tokens at most, None for any. ``cross``: the layout of keys and values of its states, which are
    ``hidden`` wide. ``strides``: of whisper's convolutions."""

    main: str
    features: tuple[int, ...] | None
    source: int | None
    cross: CacheLayout
    hidden: int
    strides: tuple[int, int]

    @property
    def encoded(self) -> Encoded:
        """How the model is captured."""
        return Encoded(self.main, self.features, self.strides, self.layout, self.cross)

    def notes(self) -> list[str]:
        states = size(self.cross.nbytes(1, 1))
        return [*super().notes(), f"cache of the encoder's states: {states} for each row and position"]

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The outputs of each part of the program."""
        return {"encode": [STATES], "cross": self.cross.names, "step": ["logits"]}


def decoder_positions(config: Any) -> int | None:
    """What the decoder has positions for; None where they are not numbered."""
    return _number(config, "max_target_positions", "max_position_embeddings")


def encoder_positions(config: Any) -> int | None:
    """What the encoder has positions for; None where they are not numbered."""
    return _number(config, "max_source_positions", "max_position_embeddings")


def _number(config: Any, *names: str) -> int | None:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)


def check_side_by_side(config: Any, name: str) -> None:
    """Raises CaptureError for a model that is put together of two others, whose parts have configs of their own."""
    if getattr(config, "encoder", None) is not None and getattr(config, "decoder", None) is not None:
        raise CaptureError(f"{name} is put together of two models, and generation is for models that are one")
