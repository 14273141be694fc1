"""Define the bank of a program that is called part by part, such as an encoder and a decoder.

It takes a program whose outputs are a dict of tensors, and the outputs that belong to each part. An assignment gives a
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
from adaptc.bank.compile_bank import RowsSource
from adaptc.bank.row_adapters import Mixes
from adaptc.bank.selection import Assigned, Assignment, Stack
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.passes.graph.lifted import user_inputs
from adaptc.runtime.executor import Executor
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore
from adaptc.state.program_parts import ProgramPart, codes_of, parts_with, pinned_parts


class DividedBank(Bank):
    """A bank of a program that is called part by part. ``parts``: part -> names of its outputs; all else as for
    :class:`Bank`."""

    def __init__(
        self,
        program: ProgramCore,
        parts: Mapping[str, Sequence[str]],
        adapters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.divided = parts
        super().__init__(program, adapters, **options)

    def _located(self) -> Mapping[str, RowsSource]:
        parts = {n: self.bare.part(outputs) for n, outputs in self.divided.items()}
        return {n: RowsSource.of(part, self._probes) for n, part in parts.items()}

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Raise AdaptcError: the parts of one call may have different numbers of rows, so there is no single call."""
        raise AdaptcError("this bank is of a program that is called part by part: call what it generates with")

    def keeping(self, mixes: Mixes, table: Mapping[str, Binding]) -> AssignedParts:  # type: ignore[override]
        """Return an assignment that keeps ``mixes`` and the adapters of ``table``, and gives a callable of each
        part."""
        return AssignedParts(self.parts(mixes, table), mixes, self, table)

    def parts(self, mixes: Mixes, table: Mapping[str, Binding]) -> Mapping[str, ProgramPart]:
        """Return the callable of each part for the assignment ``mixes``, with the adapters of ``table``."""
        found = self._runs(mixes, table)
        if not isinstance(found, Stack):
            return found()
        out = {}
        for name, source in self.sources.items():
            run = Assigned(found, mixes, _PartOf(self, name), self.program, table)
            out[name] = ProgramPart(run, frozenset(user_inputs(source.program)) | source.added)
        return out

    def _base(self) -> Callable[..., Any]:
        base: ProgramCore = self._program.base  # type: ignore[attr-defined]
        if self.state:
            return lambda: parts_with(base, Binding.none(), self.state, self.divided)
        return lambda: pinned_parts(base, self.divided)

    def _alone(self, name: str, table: Mapping[str, Binding]) -> Callable[..., Any]:
        return lambda: parts_with(self._program, table[name], self.state, self.divided)

    def codes_of(self, program: ProgramCore) -> list[Executor]:
        return codes_of(program, self.divided)

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """Raise AdaptcError: a program that is called part by part is not one exported program."""
        raise AdaptcError("this bank is of a program that is called part by part, which no one exported program is")

    def _again(self, program: ProgramCore, adapters: Mapping[str, Any], **options: Any) -> Bank:
        return DividedBank(program, self.divided, adapters, **options)


class _PartOf:
    """The owner of the code and the buffers of one part, for :class:`Assigned`."""

    def __init__(self, bank: DividedBank, name: str) -> None:
        self._bank, self._name = bank, name
        self.source = bank.sources[name]
        self.state = {n: t for n, t in bank.state.items() if n in bank.sources[name].written}

    @property
    def device(self) -> torch.device:
        return self._bank.device

    def code(self, stack: Stack, long: bool) -> Executor:
        return self._bank.codes.of(self._name, stack, long)

    def keeping(self, mixes: Mixes, table: Mapping[str, Binding]) -> Any:
        """Return what computes this part of the assignment ``mixes``, with the adapters of ``table``."""
        return self._bank.parts(mixes, table)[self._name].run

    def __deepcopy__(self, memo: dict[int, Any]) -> _PartOf:
        return _PartOf(copy.deepcopy(self._bank, memo), self._name)


class AssignedParts(Assignment):
    """An assignment that gives a callable of each part, made by :meth:`DividedBank.assigned`."""

    def __init__(
        self, parts: Mapping[str, ProgramPart], mixes: Mixes, bank: DividedBank, adapters: Mapping[str, Binding]
    ) -> None:
        super().__init__(mixes, bank.program, adapters)
        self._parts, self._bank = parts, bank

    def alone(self, name: str) -> Bound:
        return Bound(self.program, self.adapters[name])

    def parts(self, scale: Any = None) -> Mapping[str, ProgramPart]:
        """Return the callable of each part. Raises ConfigError for a ``scale``, since each row has adapters of its
        own."""
        self._keeps(scale)
        return self._parts

    def __deepcopy__(self, memo: dict[int, Any]) -> AssignedParts:
        bank = copy.deepcopy(self._bank, memo)
        return bank.keeping(self.mixes, copy.deepcopy(dict(self.adapters), memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this assignment is of a program that is called part by part: call one of its parts")

    @property
    def device(self) -> torch.device:
        return self.program.device
