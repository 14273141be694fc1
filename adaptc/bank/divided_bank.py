"""Define the bank of a program that is called part by part, such as an encoder and a decoder.

It takes a program whose outputs are a dict of tensors, and the outputs that belong to each part. A selection gives a
callable of each part, all with the same adapters for a row. Adapters are held and stacked once for all parts; code is
made for each. Every part says for itself what its rows are: an encoder may read one row for several that are decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from adaptc.bank.bank import Bank
from adaptc.bank.compile_bank import RowProgram
from adaptc.bank.row_adapters import Mixes
from adaptc.bank.selection import AdapterStack, ProgramSelection, RowSelection
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.passes.graph.lifted import user_inputs
from adaptc.runtime.executor import Executor
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore
from adaptc.state.program_parts import ProgramPart, bind_parts, executors_of_parts, pin_parts


class BankWithParts(Bank):
    """A bank of a program that is called part by part. ``parts``: part -> names of its outputs; all else as for
    :class:`Bank`."""

    def __init__(
        self,
        program: ProgramCore,
        callables_by_part: Mapping[str, Sequence[str]],
        adapters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.part_outputs = callables_by_part
        super().__init__(program, adapters, **options)

    def _find_rows(self) -> Mapping[str, RowProgram]:
        parts = {n: self.base_program.take_part(outputs) for n, outputs in self.part_outputs.items()}
        return {n: RowProgram.locate_rows(part, self._probes) for n, part in parts.items()}

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Raise AdaptcError: the parts of one call may have different numbers of rows, so there is no single call."""
        raise AdaptcError("this bank is of a program that is called part by part: call what it generates with")

    def make_selection(self, mixes: Mixes, table: Mapping[str, Binding]) -> PartsSelection:  # type: ignore[override]
        """Return a selection that keeps ``mixes`` and the adapters of ``table``, and gives a callable of each
        part."""
        return PartsSelection(self.callables_by_part(mixes, table), mixes, self, table)

    def callables_by_part(self, mixes: Mixes, table: Mapping[str, Binding]) -> Mapping[str, ProgramPart]:
        """Return the callable of each part for the selection ``mixes``, with the adapters of ``table``."""
        found = self._callable_or_stack(mixes, table)
        if not isinstance(found, AdapterStack):
            return found()
        out = {}
        for name, source in self.row_programs.items():
            run = ProgramSelection(found, mixes, _BankPart(self, name), self.program, table)
            out[name] = ProgramPart(run, frozenset(user_inputs(source.program)) | source.adapter_inputs)
        return out

    def _base_callable(self) -> Callable[..., Any]:
        base: ProgramCore = self._program.base  # type: ignore[attr-defined]
        if self.state:
            return lambda: bind_parts(base, Binding.empty(), self.state, self.part_outputs)
        return lambda: pin_parts(base, self.part_outputs)

    def _single_callable(self, name: str, table: Mapping[str, Binding]) -> Callable[..., Any]:
        return lambda: bind_parts(self._program, table[name], self.state, self.part_outputs)

    def executors_of(self, program: ProgramCore) -> list[Executor]:
        return executors_of_parts(program, self.part_outputs)

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """Raise AdaptcError: a program that is called part by part is not one exported program."""
        raise AdaptcError("this bank is of a program that is called part by part, which no one exported program is")

    def _make_bank(self, program: ProgramCore, adapters: Mapping[str, Any], **options: Any) -> Bank:
        return BankWithParts(program, self.part_outputs, adapters, **options)


class _BankPart:
    """The owner of the code and the buffers of one part, for :class:`ProgramSelection`."""

    def __init__(self, bank: BankWithParts, name: str) -> None:
        self._bank, self._name = bank, name
        self.row_program = bank.row_programs[name]
        self.state = {n: t for n, t in bank.state.items() if n in bank.row_programs[name].written_tensors}

    @property
    def device(self) -> torch.device:
        return self._bank.device

    def executor_for(self, stack: AdapterStack, has_long_rows: bool) -> Executor:
        return self._bank.code_cache.executor_for(self._name, stack, has_long_rows)

    def make_selection(self, mixes: Mixes, table: Mapping[str, Binding]) -> Any:
        """Return what computes this part of the selection ``mixes``, with the adapters of ``table``."""
        return self._bank.callables_by_part(mixes, table)[self._name].run

    def __deepcopy__(self, memo: dict[int, Any]) -> _BankPart:
        return _BankPart(copy.deepcopy(self._bank, memo), self._name)


class PartsSelection(RowSelection):
    """A selection that gives a callable of each part, made by :meth:`BankWithParts.assigned`."""

    def __init__(
        self, parts: Mapping[str, ProgramPart], mixes: Mixes, bank: BankWithParts, adapters: Mapping[str, Binding]
    ) -> None:
        super().__init__(mixes, bank.program, adapters)
        self._parts, self._bank = parts, bank

    def for_one_row(self, name: str) -> BoundProgram:
        return BoundProgram(self.program, self.adapters[name])

    def parts(self) -> Mapping[str, ProgramPart]:
        """Return the callable of each part."""
        return self._parts

    def __deepcopy__(self, memo: dict[int, Any]) -> PartsSelection:
        bank = copy.deepcopy(self._bank, memo)
        return bank.make_selection(self.mixes, copy.deepcopy(dict(self.adapters), memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this assignment is of a program that is called part by part: call one of its parts")

    @property
    def device(self) -> torch.device:
        return self.program.device
