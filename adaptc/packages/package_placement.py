"""Place the adapters of a bank at the indices of a package's compiled code.

Calls of a file that ``packages.write_bank`` wrote compute what the bank did. An adapter that is added is copied to an
index in the code between two calls, one pass over its bytes. Nothing is compiled, and no call sees a part of it.
Adapters that a call or a generation uses stay at their indices until it has ended. One table says which adapters there
are, and where. It is replaced as a whole, after an index that is in no table was written to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self
from weakref import WeakSet

from adaptc.bank.bank import Bank
from adaptc.bank.bank_report import BankReport
from adaptc.bank.capacity import Limits
from adaptc.bank.placement import BankContents, BankTable, Placement, parts_error
from adaptc.bank.row_adapters import RowSelection, check_adapter_names
from adaptc.bank.warm_up import max_call_adapters
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError
from adaptc.packages.constants import PackagedBinding
from adaptc.packages.package_engine import IndexedRows, PackageEngine, check_row_count, inputs_by_name
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.state.runner import Runner


@dataclass(frozen=True, eq=False)
class Indices:
    """The indices of a bank's adapters in the code.

    ``incomplete``: the names of adapters whose indices may hold a mix of two adapters' values, after interrupts.
    """

    index_by_name: Mapping[str, int] = field(default_factory=dict[str, int])
    incomplete: frozenset[str] = frozenset()

    def without_stale(self, adapters: Mapping[str, Binding]) -> Self:
        """Return the indices of these adapters alone."""
        kept = {n: k for n, k in self.index_by_name.items() if n in adapters}
        return replace(self, index_by_name=kept, incomplete=self.incomplete & adapters.keys())

    def with_index(self, name: str, index: int) -> Self:
        """Return the indices with a whole adapter ``name`` at ``index``."""
        return replace(self, index_by_name={**self.index_by_name, name: index}, incomplete=self.incomplete - {name})


class PackagePlacement(Placement):
    """Run rows with the compiled code of ``package``, which is that of a bank."""

    program: PackagedProgram

    def __init__(self, package: PackagedProgram) -> None:
        assert package.manifest.bank is not None
        self.program = package
        self.limits = Limits(capacity=package.manifest.bank["count"])
        self.table = BankTable(Indices())
        for index, name in enumerate(package.manifest.bank["names"]):
            self.table.contents = _with_member(self.table.contents, name, index, package.bank_member(index))
        self._bytes_per_adapter = sum(prod(r.shape) * r.dtype.itemsize for r in package.manifest.rooms.values())
        self._selections: WeakSet[IndexedRows] = WeakSet()

    # -- adapters ------------------------------------------------------------------------------------------------------

    def bind(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        return self.program.pad_adapter(adapter, **options)

    def store(
        self,
        contents: BankContents,
        name: str,
        binding: Binding,
        needed_names: Collection[str] = (),
        prepared: Sequence[Any] = (),
    ) -> BankContents:
        """Copy ``binding`` to a free index, and return contents that have it there.

        Without a free index it is written over the adapter of its name, if it has one and no selection keeps that.
        """
        assert isinstance(binding, PackagedBinding)
        own, free = contents.placed.index_by_name.get(name), self._find_free_index(contents)
        if free is not None:
            self.program.write_member(free, binding.constants)
            return _with_member(contents, name, free, binding)
        if own is not None and own not in self._reserved_indices():
            return self._overwrite(contents, name, own, binding)
        raise self._full_error(contents, name)

    def _find_free_index(self, contents: BankContents) -> int | None:
        """Return an index that no adapter of the bank and no selection uses; None where there is none."""
        used = {*contents.placed.index_by_name.values()} | self._reserved_indices()
        assert self.limits.capacity is not None
        return next((k for k in range(self.limits.capacity) if k not in used), None)

    def _reserved_indices(self) -> set[int]:
        """Return the indices that selections keep."""
        return {index for one in self._selections for index in one.index_by_name.values()}

    def _full_error(self, contents: BankContents, name: str) -> ConfigError:
        running_count = len(self._reserved_indices() - {*contents.placed.index_by_name.values()})
        return ConfigError(
            f"the bank has no room for {name!r}: the package was made for {self.limits.capacity} adapters"
            + (f", and generations that go on keep {running_count} that are gone" if running_count else "")
            + ". Remove one, or package the bank with a larger capacity"
        )

    def _overwrite(self, contents: BankContents, name: str, index: int, binding: PackagedBinding) -> BankContents:
        """Write an adapter over the one called ``name``, since no other index is free.

        The first byte destroys the old values, so a write that is interrupted is done again to its end. Where that is
        interrupted too, the adapter is refused from then on.
        """
        placed, new = contents.placed, _with_member(contents, name, index, binding)
        try:
            self.table.contents = contents.with_placed(replace(placed, incomplete=placed.incomplete | {name}))
            self.program.write_member(index, binding.constants)
            self.table.contents = new
        except BaseException:
            self.program.write_member(index, binding.constants)
            self.table.contents = new
            raise
        return new

    # -- calls ---------------------------------------------------------------------------------------------------------

    def check_call(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.program.manifest.parts:
            raise parts_error()
        inputs = self.program.manifest.inputs
        check_row_count(count, inputs, inputs_by_name(inputs, args, kwargs))

    def select(self, selection: RowSelection) -> Runner:
        """Return a runner that keeps ``selection``; nothing else is written to its indices while it exists.

        Raises AdaptcError for an adapter that the bank no longer has, and for one that two interrupts of ``replace``
        left incomplete.
        """
        names = selection.names
        with self.table.lock:
            now = self.table.contents
            indices: Indices = now.placed
            check_adapter_names(names, now.adapters)
            if incomplete := indices.incomplete & {*names}:
                raise AdaptcError(
                    f"the adapter {min(incomplete)!r} is not whole, since bank.replace was interrupted twice: call it "
                    "again"
                )
            assert self.limits.capacity is not None
            rows = IndexedRows(
                selection.binding,
                selection.mixes,
                {n: now.adapters[n] for n in names},
                selection.repeats,
                selection.lengths,
                {n: indices.index_by_name[n] for n in names},
                self.limits.capacity,
            )
            self._selections.add(rows)
        return Runner(PackageEngine(self.program), rows)

    def warm(self, adapters: int | None) -> None:
        """Check ``adapters``; nothing is left to make, since all code was compiled ahead."""
        max_call_adapters(adapters, self.limits.capacity, len(self.table.contents.adapters))

    def report(self, contents: BankContents) -> BankReport:
        return BankReport(
            contents.by_last_use(), capacity=self.limits.capacity, bytes_per_adapter=self._bytes_per_adapter
        )

    def copy(self, memo: dict[int, Any] | None) -> Placement:
        raise self.pickle_error()

    def pickle_error(self) -> AdaptcError:
        return AdaptcError(
            f"the package of a bank can be neither copied nor pickled: load {self.program.path} once more, with "
            "adaptc.load_package"
        )


def _with_member(contents: BankContents, name: str, index: int, binding: PackagedBinding) -> BankContents:
    """Return contents with a whole adapter ``name`` at ``index``."""
    new = contents.with_adapter(name, replace(binding, constants={}))
    return new.with_placed(new.placed.with_index(name, index))


def bank_of_package(package: PackagedProgram) -> Bank:
    """Return the bank whose package ``package`` is."""
    return Bank(PackagePlacement(package))
