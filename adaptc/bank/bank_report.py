"""Report what a bank holds, as a table and as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptc.binding.binding import Binding
from adaptc.passes.graph.storage import storage_key
from adaptc.tables import Column, Report, Table, format_bytes


def bytes_of(bindings: Iterable[Binding]) -> int:
    """Return the bytes of all tensors of these bindings; a tensor that several share counts once."""
    return sum({storage_key(t): t.nbytes for b in bindings for t in b.values.values()}.values())


@dataclass(frozen=True, repr=False)
class BankReport(Report):
    """A report of a bank.

    ``adapters``: name -> binding, most recently used last. ``held``: bytes of the stacks that calls made of them.
    ``stacks``: the names in each stack. ``capacity`` and ``max_bytes``: the bank's limits, None for none.
    """

    ROWS = ("adapters",)
    ROW_NAME = "adapter"

    adapters: Mapping[str, Binding] = field(repr=False)
    stack_bytes: int = 0
    stacks: tuple[tuple[str, ...], ...] = ()
    capacity: int | None = None
    max_bytes: int | None = None
    #: bytes of each adapter where its tensors do not tell: in compiled code all places have one size; else None
    bytes_per_adapter: int | None = None

    @property
    def nbytes(self) -> int:
        return (
            bytes_of(self.adapters.values())
            if self.bytes_per_adapter is None
            else self.bytes_per_adapter * len(self.adapters)
        )

    def _bytes_of_adapter(self, b: Binding) -> int:
        return bytes_of([b]) if self.bytes_per_adapter is None else self.bytes_per_adapter

    def sections(self) -> Iterable[str | Table]:
        of = "" if self.capacity is None else f" of {self.capacity}"
        limit = "" if self.max_bytes is None else f" of {format_bytes(self.max_bytes)}"
        count = len(self.stacks)
        stacks = (
            f"; {format_bytes(self.stack_bytes)} in {count} stack{'s' if count > 1 else ''} of those in use"
            if count
            else ""
        )
        yield f"bank of {len(self.adapters)}{of} adapters, {format_bytes(self.nbytes)}{limit}{stacks}"
        columns = ["adapter", Column("sites", True), Column("ranks", True), Column("bytes", True), "from"]
        yield Table(columns, [self._row(n, b) for n, b in self.adapters.items()])

    def _row(self, name: str, b: Binding) -> tuple[Any, ...]:
        ranks = ", ".join(map(str, _ranks(b))) or "-"
        return name, len(b.methods), ranks, format_bytes(self._bytes_of_adapter(b)), b.source

    def values(self) -> dict[str, Any]:
        adapters = {
            n: {"sites": len(b.methods), "ranks": _ranks(b), "bytes": self._bytes_of_adapter(b), "source": b.source}
            for n, b in self.adapters.items()
        }
        limits = {"capacity": self.capacity, "max_bytes": self.max_bytes}
        return {"adapters": adapters, "bytes": self.nbytes, "held": self.stack_bytes, "stacks": self.stacks, **limits}


def _ranks(b: Binding) -> list[int]:
    return sorted({r for m in b.methods.values() if (r := m.sizes.rank()) is not None})
