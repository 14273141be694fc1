"""Run each row of a batch with adapters of its own, on a stack of the adapters in use.

Where all rows want one adapter, or all the base, the program or its base runs directly if that compiles nothing. All
other calls run code that takes coefficients (see ``compile_bank``) on a stack. A selection keeps its adapters even
where the bank drops them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.bank.bank_code import BankCode
from adaptc.bank.compile_bank import COEFFICIENTS_INPUT, RowProgram
from adaptc.bank.row_adapters import RowSelection
from adaptc.bank.stack_adapters import AdapterStack
from adaptc.errors import AdaptcError
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.protocol.low_rank_rows import MAX_STACKED_POSITIONS, stacks_tokens
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import bind_program
from adaptc.state.runner import FORWARD, Engine, ProgramPart, Runner
from adaptc.torch_modes import outside_modes


class StackOwner(Protocol):
    """The placement of a bank, as far as its engine uses it. ``part_states``: part -> FQN -> a buffer that its code
    writes to."""

    part_states: Mapping[str, Mapping[str, Tensor]]
    code_cache: BankCode
    row_programs: Mapping[str, RowProgram]

    @property
    def program(self) -> ProgramCore: ...

    def runner_or_stack(self, selection: RowSelection) -> Runner | AdapterStack: ...

    def copy_with_adapters(self, memo: dict[int, Any]) -> StackOwner: ...


class StackEngine(Engine):
    """Run rows with the adapters of a bank over a program's graph."""

    why = "each row has adapters of its own"

    def __init__(self, owner: StackOwner) -> None:
        self._owner = owner

    @property
    def program(self) -> ProgramCore:
        return self._owner.program

    @property
    def device(self) -> torch.device:
        return self._owner.program.device

    def prepare(self, selection: RowSelection) -> Runner | StackedRows:
        """Return a runner where all rows want the same, else the rows with their stack."""
        found = self._owner.runner_or_stack(selection)
        return found if isinstance(found, Runner) else StackedRows(self._owner, selection, found)

    def run(self, prepared: Runner | StackedRows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(prepared, Runner):
            return prepared.engine.run(prepared.prepared, args, kwargs)
        if FORWARD not in self._owner.row_programs:
            raise AdaptcError("this selection is of a program that is called part by part: call one of its parts")
        return prepared.run(FORWARD, args, kwargs)

    def parts(self, prepared: Runner | StackedRows, outputs: Mapping[str, Sequence[str]]) -> Mapping[str, ProgramPart]:
        if isinstance(prepared, Runner):
            return prepared.parts(outputs)
        return {
            name: ProgramPart(
                partial(not_traced(_run_part), prepared, name),
                frozenset(user_inputs(source.program)) | source.adapter_inputs,
            )
            for name, source in self._owner.row_programs.items()
        }

    def expected_inputs(self, prepared: Runner | StackedRows) -> Mapping[str, Any]:
        if isinstance(prepared, Runner):
            return prepared.expected_inputs
        return dict(self._owner.program.executor().inputs.expected)

    def for_one_row(self, selection: RowSelection, name: str) -> Runner:
        return bind_program(self._owner.program, selection.adapters[name])

    def copy(self, runner: Runner, memo: dict[int, Any] | None) -> Runner:
        selection: Any = runner.selection
        if memo is None:
            return Runner(self, selection)
        adapters = copy.deepcopy(dict(selection.adapters), memo)
        engine = StackEngine(self._owner.copy_with_adapters(memo))
        return Runner(engine, RowSelection.of_mixes(selection.mixes, adapters, selection.repeats, selection.lengths))

    def pickle_error(self) -> AdaptcError:
        return AdaptcError("a selection of a bank cannot be pickled: make the bank where it is read, and select there")

    def describe(self, runner: Runner) -> str:
        selection: Any = runner.selection
        return f"Runner({runner.binding.source!r}, {selection.row_count} rows with adapters of their own)"


class StackedRows:
    """The rows of a selection with the stack of their adapters."""

    def __init__(self, owner: StackOwner, selection: RowSelection, stack: AdapterStack) -> None:
        self._owner, self._selection, self._stack = owner, selection, stack
        #: part -> the number of rows of its last call, and their coefficients
        self._cached_coefficients: dict[str, tuple[int, Tensor]] = {}

    def run(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a part for a batch of these rows."""
        source, stack = self._owner.row_programs[part], self._stack
        first = source.batch_input(args, kwargs)
        rows = self._selection.row_count if first is None else first.shape[source.batch_axis]
        c = self._coefficients_for(part, rows)
        positions = 1 if first is None or not rows else first.numel() // rows
        is_stacked = positions * stack.capacity <= MAX_STACKED_POSITIONS
        if self._selection.lengths is not None:  # rows are tokens
            is_stacked = stacks_tokens(rows, stack.capacity, stack.factor_dtype)
        code = self._owner.code_cache.executor_for(part, stack, not is_stacked)
        arguments = code.arguments_with_state(stack.binding, self._owner.part_states[part])
        return code(arguments, args, {**kwargs, COEFFICIENTS_INPUT: c})

    def _coefficients_for(self, part: str, rows: int) -> Tensor:
        known = self._cached_coefficients.get(part)
        if known is not None and known[0] == rows:
            return known[1]
        stack, device = self._stack, self._owner.program.device
        with outside_modes():
            found = self._selection.coefficients(rows, stack.names, stack.capacity, device)
        self._cached_coefficients[part] = rows, found
        return found


def _run_part(rows: StackedRows, part: str, **kwargs: Any) -> Any:
    return rows.run(part, (), kwargs)
