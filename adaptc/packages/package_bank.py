"""Run the package of a bank, with per-row adapters, and add, replace and remove its adapters.

Calls of a file that ``packages.write_bank`` wrote compute what the bank did. An adapter that is added is copied to an
index in the code between two calls, one pass over its bytes. Nothing is compiled, and no call sees a part of it.
Adapters that a call or a generation uses stay at their indices until it has ended. One table says which adapters there
are, and where. It is replaced as a whole, after an index that is in no table was written to.

:class:`PackagedSelection` assigns the adapters of a packaged bank to the rows of a batch, for calls that belong
together. It has the mix of adapters of each row, and the index of each adapter in the compiled code. While it exists
the bank puts nothing else at these indices. So a generation ends with the adapters it began with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from adaptc.bank.bank_report import BankReport
from adaptc.bank.compile_bank import COEFFICIENTS_INPUT
from adaptc.bank.row_adapters import Mixes, adapter_names_in, check_adapter_names, make_coefficients, parse_row_adapters
from adaptc.bank.selection import RowSelection, repeat_for_beams
from adaptc.bank.warm_up import max_call_adapters
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, listing, short_repr
from adaptc.locks import reset_after_fork
from adaptc.packages.constants import PackagedBinding
from adaptc.packages.manifest import Input
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.state.program_parts import ProgramPart


@dataclass(frozen=True, eq=False)
class BankMember:
    """An adapter of a bank, and its index in the code."""

    index: int
    binding: Binding


class PackagedBank:
    """The package of a bank, called with adapters for each row; ``adaptc.load_package`` makes it."""

    def __init__(self, package: PackagedProgram) -> None:
        assert package.manifest.bank is not None
        self._package = package
        self.capacity: int = package.manifest.bank["count"]
        names = package.manifest.bank["names"]
        self._members: Mapping[str, BankMember] = {
            n: BankMember(k, package.bank_member(k)) for k, n in enumerate(names)
        }
        self._bytes_per_adapter = sum(prod(r.shape) * r.dtype.itemsize for r in package.manifest.rooms.values())
        self._lock = reset_after_fork(threading.RLock())
        self._selections: WeakSet[PackagedSelection] = WeakSet()
        #: the names of adapters whose indices may hold a mix of two adapters' values, after interrupts
        self._incomplete_names: frozenset[str] = frozenset()

    @property
    def path(self) -> Path:
        return self._package.path

    @property
    def device(self) -> torch.device:
        return self._package.device

    @property
    def ranks(self) -> dict[str, int]:
        """Return the largest rank that an adapter may have at each site with a rank, by the FQN of its parameter."""
        return self._package.ranks

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Run a batch; ``adapters`` names those of each row, as for :meth:`Bank.__call__`.

        Raises AdaptcError where the program is called part by part.
        """
        if self._package.manifest.parts:
            raise AdaptcError("this bank is of a program that is called part by part: call what it generates with")
        selection = self.assigned(adapters)
        return selection.run(args, kwargs, len(selection.mixes))

    def assigned(self, adapters: Any) -> PackagedSelection:
        """Return a callable that keeps these adapters for its rows; ``adapters`` is as for :meth:`Bank.assigned`.

        While it exists, no other adapter is written to the indices of its adapters. Raises AdaptcError for a name that
        the bank does not have, and for an adapter that two interrupts of :meth:`replace` left incomplete.
        """
        mixes = parse_row_adapters(adapters)
        with self._lock:
            names, members = adapter_names_in(mixes), self._members
            check_adapter_names(names, members)
            if incomplete := self._incomplete_names & {*names}:
                raise AdaptcError(
                    f"the adapter {min(incomplete)!r} is not whole, since bank.replace was interrupted twice: call it "
                    "again"
                )
            index_by_name, bindings = {n: members[n].index for n in names}, {n: members[n].binding for n in names}
            selection = PackagedSelection(self._package, mixes, index_by_name, self.capacity, bindings)
            self._selections.add(selection)
            return selection

    def _find_free_index(self) -> int | None:
        """Return an index that no adapter of the bank and no selection uses; None where there is none."""
        used_indices = {one.index for one in self._members.values()} | self._reserved_indices()
        return next((k for k in range(self.capacity) if k not in used_indices), None)

    def _reserved_indices(self) -> set[int]:
        """Return the indices that selections keep."""
        return {place for one in self._selections for place in one.reserved_indices}

    def _full_error(self, name: str) -> ConfigError:
        running_count = len(self._reserved_indices() - {one.index for one in self._members.values()})
        return ConfigError(
            f"the bank has no room for {name!r}: the package was made for {self.capacity} adapters"
            + (f", and generations that go on keep {running_count} that are gone" if running_count else "")
            + ". Remove one, or package the bank with a larger capacity"
        )

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Add an adapter to the bank, at a free index; its ranks may be up to :attr:`ranks`.

        Options are those of :meth:`PackagedProgram.binding`. Raises ConfigError where there is no free index, or where
        the bank has the name, and whatever :meth:`PackagedProgram.swap` raises.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {short_repr(name)}")
        binding = self._package.pad_adapter(adapter, **options)
        with self._lock:
            if name in self._members:
                raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")
            self._store(name, self._find_free_index(), binding)

    def _store(self, name: str, index: int | None, binding: PackagedBinding) -> None:
        if index is None:
            raise self._full_error(name)
        new_members = {**self._members, name: BankMember(index, replace(binding, constants={}))}
        self._package.write_member(index, binding.constants)
        self._members = new_members
        self._incomplete_names -= {name}

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Replace the adapter called ``name`` by another.

        It goes to a free index where there is one, so calls that have begun keep the old one. Without a free index it
        is written over the old one, or ConfigError is raised where a selection keeps that. Options and further errors
        are those of :meth:`add`.
        """
        check_adapter_names([name], self._members)
        binding = self._package.pad_adapter(adapter, **options)
        with self._lock:
            check_adapter_names([name], self._members)
            own_index, free_index = self._members[name].index, self._find_free_index()
            if free_index is None and own_index not in self._reserved_indices():
                self._overwrite(name, own_index, binding)
            else:
                self._store(name, free_index, binding)

    def _overwrite(self, name: str, index: int, binding: PackagedBinding) -> None:
        """Write an adapter over the one called ``name``, since no other index is free.

        The first byte destroys the old values, so a write that is interrupted is done again to its end. Where that is
        interrupted too, the adapter is refused from then on.
        """
        new_members = {**self._members, name: BankMember(index, replace(binding, constants={}))}
        other_incomplete = self._incomplete_names - {name}
        try:
            self._incomplete_names = other_incomplete | {name}
            self._package.write_member(index, binding.constants)
            self._members, self._incomplete_names = new_members, other_incomplete
        except BaseException:
            self._package.write_member(index, binding.constants)
            self._members, self._incomplete_names = new_members, other_incomplete
            raise

    def remove(self, name: str) -> None:
        """Remove an adapter from the bank. Raises AdaptcError for a name that the bank does not have."""
        with self._lock:
            check_adapter_names([name], self._members)
            self._members = {n: one for n, one in self._members.items() if n != name}
            self._incomplete_names -= {name}

    def warm(self, adapters: int | None = None) -> None:
        """Check ``adapters`` as :meth:`Bank.warm` does; nothing is left to make, since all code was compiled ahead.

        Raises ConfigError for what is no number of adapters that a call may name.
        """
        max_call_adapters(adapters, self.capacity, len(self))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def report(self) -> BankReport:
        """Return the report of the adapters in it, each with the bytes of its index."""
        return BankReport(
            {n: one.binding for n, one in self._members.items()},
            capacity=self.capacity,
            bytes_per_adapter=self._bytes_per_adapter,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"the package of a bank can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def __repr__(self) -> str:
        return f"PackagedBank({str(self.path)!r}, {len(self)} of {self.capacity} adapters: {listing(map(repr, self))})"


class PackagedSelection(RowSelection):
    """A callable that runs a packaged bank with per-row adapters; ``PackagedBank.assigned`` makes it.

    ``index_by_name`` maps the name of each adapter to its index. ``capacity`` is the number of indices in the code.
    """

    def __init__(
        self,
        package: PackagedProgram,
        mixes: Mixes,
        index_by_name: Mapping[str, int],
        capacity: int,
        adapters: Mapping[str, Binding],
    ) -> None:
        super().__init__(mixes, package, adapters)
        self._package, self._capacity, self._index_by_name = package, capacity, index_by_name
        self._names = adapter_names_in(mixes)
        self._indices = [index_by_name[n] for n in self._names]
        #: the indices that no other adapter may be put at
        self.reserved_indices = frozenset(self._indices)

    def for_one_row(self, name: str) -> PackagedSelection:
        return PackagedSelection(self._package, ({name: 1.0},), self._index_by_name, self._capacity, self.adapters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs, self._count_rows(self._package.manifest.inputs, kwargs))

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> Any:
        """Run a call with so many rows."""
        return self._package.run(None, args, {**kwargs, COEFFICIENTS_INPUT: self._make_coefficients(rows)})

    def parts(self) -> Mapping[str, ProgramPart]:
        """Return the parts of the package with these adapters, by name."""
        parts, inputs = self._package.parts_with(None), self._package.manifest.parts
        return {
            n: ProgramPart(partial(self._run_part, p, inputs[n].inputs), {*p.inputs} - {COEFFICIENTS_INPUT})
            for n, p in parts.items()
        }

    def _run_part(self, part: ProgramPart, inputs: Sequence[Input], **kwargs: Any) -> dict[str, Tensor]:
        return part.run(**kwargs, **{COEFFICIENTS_INPUT: self._make_coefficients(self._count_rows(inputs, kwargs))})

    def _count_rows(self, inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> int:
        """Return how many rows a call has: as its inputs tell, else as many as the selection."""
        shapes = {i.name: i.tensor.shape for i in inputs if i.tensor is not None}
        size = shapes[COEFFICIENTS_INPUT][0]
        if isinstance(size, int):
            return size
        for name, shape in shapes.items():
            if size in shape and isinstance(value := kwargs.get(name), Tensor) and value.ndim == len(shape):
                return value.shape[shape.index(size)]
        return len(self.mixes)

    def _make_coefficients(self, rows: int) -> Tensor:
        c = torch.zeros(rows, self._capacity)
        c[:, self._indices] = make_coefficients(
            repeat_for_beams(self.mixes, rows), self._names, len(self._names), torch.device("cpu")
        )
        return c.to(self.device)

    @property
    def device(self) -> torch.device:
        return self._package.device
