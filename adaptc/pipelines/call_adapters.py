"""Carry what one call of a pipeline says about adapters to the modules that it calls: each image's adapters, the scale.

A pipeline calls its modules deep inside, with no argument for this. So it lies in context variables, which belong to
one call, whatever other threads and tasks call.

The rows of a batch are the images, prompt by prompt, several times over with classifier-free guidance: without the
prompts first, and then with them. A text encoder has a row for each prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from adaptc.errors import ConfigError

Mix = Mapping[str, float]


@dataclass(frozen=True)
class CallAdapters:
    """The adapters of one call: a mix for each prompt, and the number of images of each prompt."""

    mixes: Sequence[Mix]
    images_per_prompt: int

    def for_rows(self, rows: int, scale: float, known: Collection[str], component: str) -> list[Mix]:
        """Return the mix of each row of a batch, of the adapters ``known`` to a component. Raises ConfigError where the
        number of rows is no multiple of the number of prompts."""
        images = len(self.mixes) * self.images_per_prompt
        repeats = self.images_per_prompt if rows % images == 0 else 1
        mixes = [{n: w * scale for n, w in mix.items() if n in known} for mix in self.mixes for _ in range(repeats)]
        if rows % len(mixes):
            raise ConfigError(
                f"{component} computes {rows} rows at once, and the call has adapters for {len(self.mixes)} prompts: "
                "this pipeline's rows do not belong to one prompt each, so call it once for each adapter"
            )
        return mixes * (rows // len(mixes))


_ADAPTERS: ContextVar[CallAdapters | None] = ContextVar("adapters of a pipeline's call", default=None)
_TEXT_SCALE: ContextVar[float] = ContextVar("scale of text encoders", default=1.0)


def adapters_of_call() -> CallAdapters | None:
    """Return the adapters of the images of the call that runs, or None where it names none."""
    return _ADAPTERS.get()


def scale_of_text() -> float:
    """Return the factor on the scales of text encoders' adapters in the call that runs."""
    return _TEXT_SCALE.get()


@contextlib.contextmanager
def calling_with(adapters: CallAdapters | None) -> Iterator[None]:
    """Run the block, a call of a pipeline, with these adapters."""
    token = _ADAPTERS.set(adapters)
    try:
        yield
    finally:
        _ADAPTERS.reset(token)


@contextlib.contextmanager
def encoding_with(scale: float) -> Iterator[None]:
    """Run the block, which encodes prompts, with a factor on the scales of text encoders' adapters."""
    token = _TEXT_SCALE.set(scale)
    try:
        yield
    finally:
        _TEXT_SCALE.reset(token)
