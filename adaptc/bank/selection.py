"""Keep a selection of adapters to the rows of a batch, for calls that belong together.

A selection takes the mix of each row, and what computes it: a callable where all rows want the same, else a stack of
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

from adaptc.bank.compile_bank import COEFFICIENTS_INPUT, RowProgram
from adaptc.bank.row_adapters import Mixes, adapter_names_in, make_coefficients
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.passes.protocol.low_rank_rows import MAX_STACKED_POSITIONS
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.executor import Executor
from adaptc.state.bound import BoundProgram, PinnedRunner
from adaptc.state.core import ProgramCore
from adaptc.torch_modes import outside_modes


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Adapters stacked for calls that mix them by row.

    ``names`` and ``bindings``: the adapters and their bindings, by place. ``capacity``: the number of places that the
    code reads, of which some may be filler. ``binding``: the stacked tensors.
    """

    names: tuple[str, ...]
    bindings: tuple[Binding, ...]
    capacity: int
    binding: Binding

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.binding.values.values())

    @property
    def named_bindings(self) -> Iterable[tuple[str, Binding]]:
        """Return each name with its binding."""
        return zip(self.names, self.bindings, strict=True)

    def serves(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> bool:
        """Return whether the stack has the adapters ``names`` as ``table`` has them now, and at most twice as many
        adapters."""
        own = dict(self.named_bindings)
        return all(own.get(n) is table[n] for n in names) and len(self.names) <= 2 * len(names)


class StackOwner(Protocol):
    """The owner of the code that stacks run in: a bank, or one part of it.

    ``state``: FQN -> a buffer that this code writes to.
    """

    @property
    def row_program(self) -> RowProgram: ...

    @property
    def state(self) -> Mapping[str, Tensor]: ...

    @property
    def device(self) -> torch.device: ...

    def executor_for(self, stack: AdapterStack, has_long_rows: bool) -> Executor: ...

    def make_selection(self, mixes: Mixes, table: Mapping[str, Binding]) -> Any: ...


def repeat_for_beams(mixes: Mixes, rows: int) -> Mixes:
    """Return the mix of each of ``rows`` rows, with each of ``mixes`` equally many times in succession (beams).

    Raises AdaptcError where ``rows`` is no multiple of the number of mixes.
    """
    each, rest = divmod(rows, len(mixes)) if mixes else (0, rows)
    if rest:
        raise AdaptcError(f"adapters has {len(mixes)} entries, and the batch has {rows} rows")
    return tuple(mix for mix in mixes for _ in range(each))


class RowSelection(PinnedRunner):
    """A callable that keeps a selection of adapters to rows.

    ``mixes``: the mix of each row. ``program``: the program that the bank is of. ``adapters``: name -> the binding of
    each adapter in ``mixes``.
    """

    def __init__(self, mixes: Mixes, program: Any, adapters: Mapping[str, Binding]) -> None:
        self.mixes, self.program, self.adapters = mixes, program, adapters
        self.binding = replace(Binding.empty(), source=", ".join(map(str, adapter_names_in(mixes))) or "the base")

    @property
    def has_adapter(self) -> bool:
        return any(self.mixes)

    @abstractmethod
    def for_one_row(self, name: str) -> PinnedRunner:
        """Return a callable of the program with the adapter ``name`` alone."""

    def check_encoder_rows(self, rows: int) -> None:
        """Raise AdaptcError where a call encodes another number of rows than the selection has: nothing tells which
        rows they are."""
        if rows != len(self.mixes):
            raise AdaptcError(
                f"adapters has {len(self.mixes)} entries, and {rows} rows are encoded: give one entry for each row. "
                "Where a generation goes on with some of its rows alone, or has them several times (recordings that "
                "are cut, timestamps, several temperatures or answers), run those of each adapter by themselves"
            )


class ProgramSelection(RowSelection):
    """A selection whose calls run the whole program, or one part of it; made by ``Bank.selection``.

    ``runs``: a callable where all rows want the same, else the stack.
    """

    def __init__(
        self,
        callable_or_stack: Callable[..., Any] | AdapterStack,
        mixes: Mixes,
        owner: StackOwner,
        program: ProgramCore,
        adapters: Mapping[str, Binding],
    ) -> None:
        super().__init__(mixes, program, adapters)
        self._callable_or_stack, self._owner = callable_or_stack, owner
        self._cached_coefficients: dict[int, Tensor] = {}
        self._untraced_call = not_traced(_call)

    def for_one_row(self, name: str) -> BoundProgram:
        return BoundProgram(self.program, self.adapters[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramSelection:
        """Return a selection with tensors of its own, on a copy of its bank that continues from what calls wrote."""
        bank = copy.deepcopy(self._owner, memo)
        return bank.make_selection(self.mixes, copy.deepcopy(dict(self.adapters), memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._untraced_call(self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs, source = self._callable_or_stack, self._owner.row_program
        if not isinstance(runs, AdapterStack):
            return runs(*args, **kwargs)
        first = source.batch_input(args, kwargs)
        rows = len(self.mixes) if first is None else first.shape[source.batch_axis]
        c = self._coefficients_for(runs, rows)
        positions = 1 if first is None or not rows else first.numel() // rows
        code = self._owner.executor_for(runs, positions * runs.capacity > MAX_STACKED_POSITIONS)
        return code(code.arguments_with_state(runs.binding, self._owner.state), args, {**kwargs, COEFFICIENTS_INPUT: c})

    def _coefficients_for(self, stack: AdapterStack, rows: int) -> Tensor:
        found = self._cached_coefficients.get(rows)
        if found is None:
            with outside_modes():
                found = make_coefficients(repeat_for_beams(self.mixes, rows), stack.names, stack.capacity, self.device)
            self._cached_coefficients = {rows: found}
        return found

    @property
    def device(self) -> torch.device:
        return self._owner.device


def _call(selection: ProgramSelection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return selection.run(args, kwargs)
