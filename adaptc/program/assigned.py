"""An assignment of adapters to rows, kept for calls that belong together.

Before: a bank, and what each row is to have. After: a callable that has these adapters as they were when it was made,
whatever the bank has by now, for batches in which each row is there once, or so many times (beams).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.passes.ir.low_rank_rows import SIDE_BY_SIDE
from adaptc.program.bound import Keeping
from adaptc.rows.assignment import Mixes, coefficients, used
from adaptc.rows.code import KEYWORD
from adaptc.rows.stacks import Stack
from adaptc.runtime.executor import Executor


class Rows(Protocol):
    """What is asked of a bank."""

    @property
    def axis(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None: ...

    def code(self, stack: Stack, long: bool) -> Executor: ...


class Assigned(Keeping):
    """Made by :meth:`Bank.assigned`."""

    def __init__(self, bank: Rows, mixes: Mixes, runs: Callable[..., Any] | Stack) -> None:
        self._bank, self.mixes, self._runs = bank, mixes, runs
        self.binding = replace(Binding.none(), source=", ".join(map(str, used(mixes))) or "the base")
        self._coefficients: dict[int, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs = self._runs
        if not isinstance(runs, Stack):
            return runs(*args, **kwargs)
        first = self._bank.first(args, kwargs)
        rows = len(self.mixes) if first is None else first.shape[self._bank.axis]
        c = self._for(runs, rows)
        positions = 1 if first is None or not rows else first.numel() // rows
        code = self._bank.code(runs, positions * runs.count > SIDE_BY_SIDE)
        return code(code.arguments(runs.binding), args, {**kwargs, KEYWORD: c})

    def _for(self, stack: Stack, rows: int) -> Tensor:
        found = self._coefficients.get(rows)
        if found is None:
            each, rest = divmod(rows, len(self.mixes))
            if rest:
                raise AdaptcError(f"adapters has {len(self.mixes)} entries, and the batch has {rows} rows")
            mixes = tuple(mix for mix in self.mixes for _ in range(each))
            found = coefficients(mixes, stack.names, stack.count, self.device)
            self._coefficients = {rows: found}
        return found

    @property
    def device(self) -> torch.device:
        return self._bank.device
