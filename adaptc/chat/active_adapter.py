"""Choose who answers: the base model, or the model with one of its adapters, swapped live.

Each change makes a new :class:`Voice`. A change that fails keeps the current one. A voice may be used until the next
one is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.api.change_adapter import swap
from adaptc.chat.models import OpenedModel
from adaptc.errors import AdaptcError, CaptureError, CheckpointError, SwapError, did_you_mean, listing
from adaptc.generation.generator import Generator

#: function that returns a context which shows what is being done and how long it took
Working = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Voice:
    """A generator and the adapter it answers with.

    ``name`` is the adapter's; None for the base. ``seconds`` is the time of the swap; None where there was none.
    """

    generator: Generator
    name: str | None
    seconds: float | None = None


class Voices:
    """The adapters that a chat can answer with, and the programs that they run in.

    ``adapters`` maps a name to a path. ``working`` and ``note`` show progress.
    """

    def __init__(
        self, opened: OpenedModel, adapters: Mapping[str, Path], working: Working, note: Callable[[str], object] = str
    ) -> None:
        self._note = note
        self.adapters: dict[str, Any] = {**opened.own, **adapters}
        self._capture, self._made, self._working = opened.capture, list(opened.made), working
        self._plain: Generator | None = None
        self._ran: list[Generator] = []
        first = next(iter([*adapters, *opened.own]), None)
        if len(adapters) > 1 and self._capture is not None and not self._made:
            self._together(list(adapters.values()))
        self.current = self._base() if first is None else self._with(first)

    def use(self, name: str) -> Voice:
        """Answer with the adapter called ``name``, or in the directory or file ``name``, and return its voice.

        Raises AdaptcError where there is no such adapter, or no program takes it.
        """
        if name not in self.adapters:
            path = Path(name).expanduser()
            if not path.exists():
                raise CheckpointError(
                    f"there is no adapter {name!r}, and no directory or file of this name"
                    f"{did_you_mean(name, self.adapters)}; /adapters lists those there are"
                )
            voice = self._with(name, path)
            self.adapters[name] = path
        else:
            voice = self._with(name)
        self.current = voice
        return voice

    def base(self) -> Voice:
        """Answer without an adapter, and return this voice."""
        self.current = self._base()
        return self.current

    def _with(self, name: str, path: Path | None = None) -> Voice:
        adapter = self.adapters[name] if path is None else path
        refused: SwapError | None = None
        for generator in self._made:
            start = time.perf_counter()
            try:
                swap(generator, adapter)  # type: ignore[arg-type]
            except SwapError as error:
                refused = error
            else:
                took = time.perf_counter() - start
                return Voice(self._prepared(generator), name, took)
        if self._capture is None:
            assert refused is not None
            raise refused
        return Voice(self._prepared(self._captured(adapter)), name)

    def _base(self) -> Voice:
        if self._plain is None:
            self._plain = (self._made[0] if self._made else self._captured(None)).base
        return Voice(self._prepared(self._plain), None)

    def _together(self, paths: list[Path]) -> None:
        """Capture one program for the adapters at ``paths``, if one can take them all.

        Otherwise each adapter gets a program when it is asked for, which also raises what is wrong with it.
        """
        try:
            self._captured(paths)
        except CaptureError:
            raise
        except AdaptcError as error:
            self._note(f"no program takes all of these adapters, so the first gets its own: {error}")

    def _captured(self, adapter: Any) -> Generator:
        assert self._capture is not None
        paths = adapter if isinstance(adapter, list) else [adapter]
        what = "" if adapter is None else f" for {listing(paths, 3)}"
        with self._working(f"capturing the model{what}"):
            made = self._capture(adapter)
        self._made.append(made)
        return made

    def _prepared(self, generator: Generator) -> Generator:
        """Return ``generator`` after a first call, so that compiling and other work done once does not delay the first
        answer."""
        if not any(generator is g for g in self._ran):
            with self._working("preparing"):
                generator.prefill(torch.zeros(1, 1, dtype=torch.int64, device=generator.device))
            self._ran.append(generator)
        return generator
