"""Choose who answers: the base model, or the model with one of its adapters, swapped live.

Each change makes a new :class:`ActiveAdapter`. A change that fails keeps the current one. An active adapter may be used
until the next one is made.
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
Progress = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class ActiveAdapter:
    """A generator and the adapter it answers with.

    ``name`` is the adapter's; None for the base. ``swap_seconds`` is the time of the swap; None where there was none.
    """

    generator: Generator
    name: str | None
    swap_seconds: float | None = None


class ChatAdapters:
    """The adapters that a chat can answer with, and the programs that they run in.

    ``adapters`` maps a name to a path. ``progress`` and ``note`` show progress.
    """

    def __init__(
        self, model: OpenedModel, adapters: Mapping[str, Path], progress: Progress, note: Callable[[str], object] = str
    ) -> None:
        self._note = note
        self.adapters: dict[str, Any] = {**model.bundled_adapters, **adapters}
        self._capture, self._generators, self._progress = model.capture, list(model.generators), progress
        self._base_generator: Generator | None = None
        self._warm_generators: list[Generator] = []
        first = next(iter([*adapters, *model.bundled_adapters]), None)
        if len(adapters) > 1 and self._capture is not None and not self._generators:
            self._capture_for_all(list(adapters.values()))
        self.current = self._without_adapter() if first is None else self._swapped_to(first)

    def activate(self, name: str) -> ActiveAdapter:
        """Answer with the adapter called ``name``, or in the directory or file ``name``, and return it.

        Raises AdaptcError where there is no such adapter, or no program takes it.
        """
        if name not in self.adapters:
            path = Path(name).expanduser()
            if not path.exists():
                raise CheckpointError(
                    f"there is no adapter {name!r}, and no directory or file of this name"
                    f"{did_you_mean(name, self.adapters)}; /adapters lists those there are"
                )
            voice = self._swapped_to(name, path)
            self.adapters[name] = path
        else:
            voice = self._swapped_to(name)
        self.current = voice
        return voice

    def activate_base(self) -> ActiveAdapter:
        """Answer without an adapter, and return it."""
        self.current = self._without_adapter()
        return self.current

    def _swapped_to(self, name: str, path: Path | None = None) -> ActiveAdapter:
        adapter = self.adapters[name] if path is None else path
        swap_error: SwapError | None = None
        for generator in self._generators:
            start = time.perf_counter()
            try:
                swap(generator, adapter)  # type: ignore[arg-type]
            except SwapError as error:
                swap_error = error
            else:
                took = time.perf_counter() - start
                return ActiveAdapter(self._warmed_up(generator), name, took)
        if self._capture is None:
            assert swap_error is not None
            raise swap_error
        return ActiveAdapter(self._warmed_up(self._capture_generator(adapter)), name)

    def _without_adapter(self) -> ActiveAdapter:
        if self._base_generator is None:
            self._base_generator = (self._generators[0] if self._generators else self._capture_generator(None)).base
        return ActiveAdapter(self._warmed_up(self._base_generator), None)

    def _capture_for_all(self, paths: list[Path]) -> None:
        """Capture one program for the adapters at ``paths``, if one can take them all.

        Otherwise each adapter gets a program when it is asked for, which also raises what is wrong with it.
        """
        try:
            self._capture_generator(paths)
        except CaptureError:
            raise
        except AdaptcError as error:
            self._note(f"no program takes all of these adapters, so the first gets its own: {error}")

    def _capture_generator(self, adapter: Any) -> Generator:
        assert self._capture is not None
        paths = adapter if isinstance(adapter, list) else [adapter]
        what = "" if adapter is None else f" for {listing(paths, 3)}"
        with self._progress(f"capturing the model{what}"):
            made = self._capture(adapter)
        self._generators.append(made)
        return made

    def _warmed_up(self, generator: Generator) -> Generator:
        """Return ``generator`` after a first call, so that compiling and other work done once does not delay the first
        answer."""
        if not any(generator is g for g in self._warm_generators):
            with self._progress("preparing"):
                generator.prefill(torch.zeros(1, 1, dtype=torch.int64, device=generator.device))
            self._warm_generators.append(generator)
        return generator
