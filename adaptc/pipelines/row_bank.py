"""Run rows of a batch on different adapters of a component: a bank that follows the adapters that are loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from adaptc.bank.bank import Bank
from adaptc.binding.binding import Binding
from adaptc.locks import reset_after_fork
from adaptc.pipelines.component_state import ComponentState
from adaptc.program.adapted_program import AdaptedProgram


class RowBank:
    """A bank of one component, made at the first call that needs it, and kept while the program stays the same."""

    def __init__(self) -> None:
        self._bank: Bank | None = None
        self._program: AdaptedProgram | None = None
        self._held: dict[str, Binding] = {}
        self._lock = reset_after_fork(threading.Lock())

    def call(self, state: ComponentState, inputs: Mapping[str, Any], mixes: Sequence[Mapping[str, float]]) -> Any:
        """Return the program's output for ``inputs``, with a mix of adapters for each row.

        Raises ConfigError where adapters are fused, and what a bank raises.
        """
        state.check_not_fused("choose adapters for each image")
        used = {n for mix in mixes for n in mix}
        with self._lock:
            bank = self._bank_of(state)
            for name in [n for n, b in self._held.items() if state.adapters.get(n) is not b]:
                bank.remove(name)
                del self._held[name]
            for name in sorted(used - self._held.keys()):
                bank.add(name, state.adapters[name])
                self._held[name] = state.adapters[name]
            runner = bank.select(list(mixes))
        return runner(**inputs)

    def _bank_of(self, state: ComponentState) -> Bank:
        if self._bank is None or self._program is not state.program:
            self._bank, self._program, self._held = state.program.bank(), state.program, {}
        return self._bank
