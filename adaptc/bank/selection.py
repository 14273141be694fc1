"""Keep an assignment of adapters to the rows of a batch, for calls that belong together.

An assignment takes the mix of each row, and what computes it: a callable where all rows want the same, else a stack of
adapters. It keeps its adapters even where the bank that they come from drops them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.bank.compile_bank import KEYWORD, RowsSource
from adaptc.bank.row_adapters import Mixes, coefficients, used
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, shown
from adaptc.passes.protocol.low_rank_rows import SIDE_BY_SIDE
from adaptc.runtime.dynamo_boundary import outside
from adaptc.runtime.executor import Executor
from adaptc.state.bound import Bound, Keeping
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import SCALE
from adaptc.torch_modes import plainly


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters stacked for calls that mix them by row.

    ``names`` and ``members``: the adapters and their bindings, by place. ``count``: the number of places that the code
    reads, of which some may be filler. ``binding``: the stacked tensors.
    """

    names: tuple[str, ...]
    members: tuple[Binding, ...]
    count: int
    binding: Binding

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.binding.values.values())

    @property
    def pairs(self) -> Iterable[tuple[str, Binding]]:
        """Return each name with its binding."""
        return zip(self.names, self.members, strict=True)

    def serves(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> bool:
        """Return whether the stack has the adapters ``names`` as ``table`` has them now, and at most twice as many
        adapters."""
        own = dict(self.pairs)
        return all(own.get(n) is table[n] for n in names) and len(self.names) <= 2 * len(names)


class Stacks(Protocol):
    """The owner of the code that stacks run in: a bank, or one part of it.

    ``state``: FQN -> a buffer that this code writes to.
    """

    @property
    def source(self) -> RowsSource: ...

    @property
    def state(self) -> Mapping[str, Tensor]: ...

    @property
    def device(self) -> torch.device: ...

    def code(self, stack: Stack, long: bool) -> Executor: ...

    def keeping(self, mixes: Mixes, table: Mapping[str, Binding]) -> Any: ...


def repeated(mixes: Mixes, rows: int) -> Mixes:
    """Return the mix of each of ``rows`` rows, with each of ``mixes`` equally many times in succession (beams).

    Raises AdaptcError where ``rows`` is no multiple of the number of mixes.
    """
    each, rest = divmod(rows, len(mixes)) if mixes else (0, rows)
    if rest:
        raise AdaptcError(f"adapters has {len(mixes)} entries, and the batch has {rows} rows")
    return tuple(mix for mix in mixes for _ in range(each))


class Assignment(Keeping):
    """A callable that keeps an assignment of adapters to rows.

    ``mixes``: the mix of each row. ``program``: the program that the bank is of. ``adapters``: name -> the binding of
    each adapter in ``mixes``.
    """

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
        """Return a callable of the program with the adapter ``name`` alone."""

    def check_encoded(self, rows: int) -> None:
        """Raise AdaptcError where a call encodes another number of rows than the assignment has: nothing tells which
        rows they are."""
        if rows != len(self.mixes):
            raise AdaptcError(
                f"adapters has {len(self.mixes)} entries, and {rows} rows are encoded: give one entry for each row. "
                "Where a generation goes on with some of its rows alone, or has them several times (recordings that "
                "are cut, timestamps, several temperatures or answers), run those of each adapter by themselves"
            )


class Assigned(Assignment):
    """An assignment whose calls run the whole program, or one part of it; made by ``Bank.assigned``.

    ``runs``: a callable where all rows want the same, else the stack.
    """

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
        """Return an assignment with tensors of its own, on a copy of its bank that continues from what calls wrote."""
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
