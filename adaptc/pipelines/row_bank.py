"""Run rows of a batch on different adapters of a component: a bank that follows the adapters that are loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from adaptc.bank.bank import Bank
from adaptc.errors import ConfigError
from adaptc.locks import reset_after_fork
from adaptc.pipelines.component_state import ComponentState, PlacedAdapter
from adaptc.program.adapted_program import AdaptedProgram


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
        if not used:
            return self._program or state.program
        program = state.adapters[used[0]].program
        for name in used:
            if state.adapters[name].program is not program:
                raise ConfigError(
                    f"{used[0]!r} and {name!r} are adapters of different methods, and one batch has adapters of one "
                    "method: call the pipeline once for each method"
                )
        return program
