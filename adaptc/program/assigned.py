"""An assignment of adapters to the rows of a batch, kept for calls that belong together.

Before: for each row its mix, and what computes such a call: a program as it is, where all rows want the same, or a
stack of adapters. After: a callable that keeps them, whatever becomes of the bank that they come from.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, shown
from adaptc.passes.ir.low_rank_rows import SIDE_BY_SIDE
from adaptc.program.bound import Bound, Keeping
from adaptc.program.core import ProgramCore
from adaptc.program.views import SCALE
from adaptc.rows.assignment import Mixes, coefficients, used
from adaptc.rows.code import KEYWORD, RowsSource
from adaptc.runtime.executor import Executor
from adaptc.runtime.outside_compilers import outside
from adaptc.torch_modes import plainly


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters side by side: names and bindings by place, the number of places, and what code for so many reads."""

    names: tuple[str, ...]
    members: tuple[Binding, ...]
    count: int
    binding: Binding

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.binding.values.values())

    @property
    def pairs(self) -> Iterable[tuple[str, Binding]]:
        """Each name with its binding."""
        return zip(self.names, self.members, strict=True)

    def serves(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> bool:
        """Whether all that a call uses is here, as it is now, and not much else."""
        own = dict(self.pairs)
        return all(own.get(n) is table[n] for n in names) and len(self.names) <= 2 * len(names)


class Stacks(Protocol):
    """Who has the code that stacks run in, and the buffers, by FQN, that it writes to."""

    @property
    def source(self) -> RowsSource: ...

    @property
    def state(self) -> Mapping[str, Tensor]: ...

    @property
    def device(self) -> torch.device: ...

    def code(self, stack: Stack, long: bool) -> Executor: ...

    def keeping(self, mixes: Mixes, table: Mapping[str, Binding]) -> Any: ...


def repeated(mixes: Mixes, rows: int) -> Mixes:
    """The mix of each of so many rows: each of ``mixes`` several times after each other (beams). Raises AdaptcError
    where they do not come out even."""
    each, rest = divmod(rows, len(mixes)) if mixes else (0, rows)
    if rest:
        raise AdaptcError(f"adapters has {len(mixes)} entries, and the batch has {rows} rows")
    return tuple(mix for mix in mixes for _ in range(each))


class Assignment(Keeping):
    """What keeps an assignment: ``mixes``, with an entry for each row. ``program``: what it is of; ``adapters``: by
    name those in it, as they are kept."""

    def __init__(self, mixes: Mixes, program: Any, adapters: Mapping[str, Binding]) -> None:
        self.mixes, self.program, self.adapters = mixes, program, adapters
        self.binding = replace(Binding.none(), source=", ".join(map(str, used(mixes))) or "the base")

    @property
    def adapted(self) -> bool:
        return any(self.mixes)

    def _keeps(self, scale: Any) -> None:
        if scale is not None:
            raise ConfigError(
                f"{SCALE}={shown(scale)} is not taken where each row has adapters of its own: give a row a weight, as "
                "in adapters=[{'fr': 0.5}, ...]"
            )

    @abstractmethod
    def alone(self, name: str) -> Keeping:
        """One of the same adapter for one row."""

    def check_encoded(self, rows: int) -> None:
        """Raises AdaptcError where others than all rows of the assignment are encoded, of which nothing tells which
        they are."""
        if rows != len(self.mixes):
            raise AdaptcError(
                f"adapters has {len(self.mixes)} entries, and {rows} rows are encoded: give one entry for each row. "
                "Where a generation goes on with some of its rows alone, or has them several times (recordings that "
                "are cut, timestamps, several temperatures or answers), run those of each adapter by themselves"
            )


class Assigned(Assignment):
    """Made by ``Bank.assigned``. ``runs``: what computes it."""

    def __init__(
        self,
        runs: Callable[..., Any] | Stack,
        mixes: Mixes,
        bank: Stacks,
        program: ProgramCore,
        adapters: Mapping[str, Binding],
    ) -> None:
        super().__init__(mixes, program, adapters)
        self._runs, self._bank = runs, bank
        self._coefficients: dict[int, Tensor] = {}
        self._called = outside(_called)

    def alone(self, name: str) -> Bound:
        return Bound(self.program, self.adapters[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Assigned:
        """The same with tensors of its own, on a copy of its bank that goes on from what calls wrote."""
        bank = copy.deepcopy(self._bank, memo)
        return bank.keeping(self.mixes, copy.deepcopy(dict(self.adapters), memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs, source = self._runs, self._bank.source
        if not isinstance(runs, Stack):
            return runs(*args, **kwargs)
        first = source.first(args, kwargs)
        rows = len(self.mixes) if first is None else first.shape[source.axis]
        c = self._for(runs, rows)
        positions = 1 if first is None or not rows else first.numel() // rows
        code = self._bank.code(runs, positions * runs.count > SIDE_BY_SIDE)
        return code(code.own_arguments(runs.binding, self._bank.state), args, {**kwargs, KEYWORD: c})

    def _for(self, stack: Stack, rows: int) -> Tensor:
        found = self._coefficients.get(rows)
        if found is None:
            with plainly():
                found = coefficients(repeated(self.mixes, rows), stack.names, stack.count, self.device)
            self._coefficients = {rows: found}
        return found

    @property
    def device(self) -> torch.device:
        return self._bank.device


def _called(assigned: Assigned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return assigned.run(args, kwargs)
