"""Give each image of a call its adapters: carry what the call says to the modules that it calls, and run their rows.

A pipeline calls its modules deep inside, with no argument for this. So it lies in context variables, which belong to
one call, whatever other threads and tasks call.

The rows of a batch are the images, prompt by prompt, several times over with classifier-free guidance: without the
prompts first, and then with them. A text encoder has a row for each prompt.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from adaptc.bank.bank import Bank
from adaptc.errors import ConfigError
from adaptc.locks import reset_after_fork
from adaptc.pipelines.component_state import ComponentState, PlacedAdapter
from adaptc.program.adapted_program import AdaptedProgram

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
        mixes: list[Mix] = [
            {n: w * scale for n, w in mix.items() if n in known} for mix in self.mixes for _ in range(repeats)
        ]
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


class RowBank:
    """A bank of one component, made at the first call that needs it, and kept while the same program serves."""

    def __init__(self) -> None:
        self._bank: Bank | None = None
        self._program: AdaptedProgram | None = None
        self._held: dict[str, PlacedAdapter] = {}
        self._lock = reset_after_fork(threading.Lock())

    def call(self, state: ComponentState, inputs: Mapping[str, Any], mixes: Sequence[Mapping[str, float]]) -> Any:
        """Return the program's output for ``inputs``, with a mix of adapters for each row.

        Raises ConfigError where adapters are fused, or are of methods that no program has together, and what a bank
        raises.
        """
        state.check_not_fused("choose adapters for each image")
        used = list(dict.fromkeys(n for mix in mixes for n in mix))
        program = self._program_of(state, used)
        with self._lock:
            if self._bank is None or self._program is not program:
                self._bank, self._program, self._held = program.bank(), program, {}
            for name in [n for n, a in self._held.items() if state.adapters.get(n) is not a]:
                self._bank.remove(name)
                del self._held[name]
            for name in used:
                if name not in self._held:
                    self._bank.add(name, state.adapters[name].binding)
                    self._held[name] = state.adapters[name]
            runner = self._bank.select(list(mixes))
        return runner(**inputs)

    def _program_of(self, state: ComponentState, used: Sequence[str]) -> AdaptedProgram:
        """Return the program that all of these adapters are bound to."""
        own = state.require_program("the adapters of each row need a bank")
        if not used:
            return self._program or own
        program: Any = state.adapters[used[0]].program
        for name in used:
            if state.adapters[name].program is not program:
                raise ConfigError(
                    f"{used[0]!r} and {name!r} are adapters of different methods, and one batch has adapters of one "
                    "method: call the pipeline once for each method"
                )
        return program
