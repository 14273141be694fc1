"""Hold what a bank has at one moment: its adapters, the order of their use, and what calls made of them.

A :class:`BankContents` is never written to. A change makes another one, which the bank puts in place by one assignment.
So a change that is interrupted leaves the bank either as it was, or changed as a whole. :class:`BankView` is the bank
as far as it can be looked at; each look reads the contents of one moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from adaptc.bank.bank_report import BankReport, bytes_of
from adaptc.bank.capacity import Limits
from adaptc.bank.selection import AdapterStack
from adaptc.binding.binding import Binding
from adaptc.errors import did_you_mean, listing
from adaptc.state.core import ProgramCore
from adaptc.tables import format_bytes

#: number of stacks that are kept, for calls that use other adapters in turn
MAX_STACKS = 2


@dataclass(frozen=True, eq=False)
class BankContents:
    """The contents of a bank at one moment.

    ``adapters``: name -> binding, in the order in which they were added. ``use_order``: their names, most recently used
    last. ``stacks``: the stacks that are kept, most recently used last. ``bound_programs``: name -> that adapter bound
    to the program.
    """

    adapters: Mapping[str, Binding] = field(default_factory=dict)
    use_order: tuple[str, ...] = ()
    stacks: tuple[AdapterStack, ...] = ()
    bound_programs: Mapping[str, Any] = field(default_factory=dict)

    def with_adapter(self, name: str, binding: Binding, evicted: Collection[str] = ()) -> Self:
        """Return contents that have ``binding`` under ``name``, new or as a replacement, and not the adapters that are
        ``evicted``."""
        left = self.without_adapters(evicted)
        order = (*(n for n in left.use_order if n != name), name)
        return replace(left, adapters={**left.adapters, name: binding}, use_order=order).without_stale()

    def without_adapters(self, names: Collection[str]) -> Self:
        """Return contents without the adapters called ``names``."""
        left = {n: b for n, b in self.adapters.items() if n not in names}
        return replace(
            self, adapters=left, use_order=tuple(n for n in self.use_order if n not in names)
        ).without_stale()

    def after_use_of(self, names: Collection[str]) -> Self:
        """Return contents after a call that used the adapters ``names``, which are now the most recently used."""
        last = tuple(n for n in names if n in self.adapters)
        if self.use_order[len(self.use_order) - len(last) :] == last:
            return self
        gone = frozenset(last)
        return replace(self, use_order=(*(n for n in self.use_order if n not in gone), *last))

    def with_stack(self, stack: AdapterStack) -> Self:
        """Return contents with ``stack`` as the most recently used, or these contents where one of its adapters is no
        longer in them."""
        if self.stacks[-1:] == (stack,) or any(self.adapters.get(n) is not b for n, b in stack.named_bindings):
            return self
        others = tuple(s for s in self.stacks if s is not stack)
        return replace(self, stacks=(*others, stack)[-MAX_STACKS:])

    def with_bound(self, name: str, bound: Any) -> Self:
        """Return contents that keep ``bound`` under ``name``, as long as that adapter is still in them."""
        return replace(self, bound_programs={**self.bound_programs, name: bound}).without_stale()

    def without_stale(self) -> Self:
        """Return contents without the stacks and bound callables whose adapters are no longer in them."""
        held = self.adapters
        stacks = tuple(s for s in self.stacks if all(held.get(n) is b for n, b in s.named_bindings))
        bound = {n: b for n, b in self.bound_programs.items() if held.get(n) is b.binding}
        return replace(self, stacks=stacks, bound_programs=bound)


class BankView:
    """A bank, as far as it can be looked at. Iterating yields the names, least recently used first."""

    limits: Limits
    _program: ProgramCore
    _contents: BankContents

    def __contains__(self, name: object) -> bool:
        return name in self._contents.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents.use_order)

    def __len__(self) -> int:
        return len(self._contents.adapters)

    def __getitem__(self, name: str) -> Binding:
        """Return the adapter called ``name``, bound to the program. Raises KeyError where there is none."""
        held = self._contents.adapters
        if name not in held:
            raise KeyError(f"the bank has no adapter {name!r}{did_you_mean(name, held)}")
        return held[name]

    @property
    def capacity(self) -> int | None:
        """Return how many adapters the bank may hold; None for any number."""
        return self.limits.capacity

    @property
    def max_rank(self) -> int | None:
        """Return the largest rank; None for any."""
        return self.limits.max_rank

    @property
    def program(self) -> ProgramCore:
        """Return the program, as it was when the bank was made."""
        return self._program

    @property
    def device(self) -> torch.device:
        return self._program.device

    @property
    def adapters(self) -> Mapping[str, Binding]:
        """Return the present adapters by name."""
        return self._contents.adapters

    @property
    def nbytes(self) -> int:
        """Return the bytes of all adapters."""
        return bytes_of(self._contents.adapters.values())

    @property
    def held(self) -> int:
        """Return the bytes of the stacks kept."""
        return sum(s.nbytes for s in self._contents.stacks)

    def report(self) -> BankReport:
        """Return a table of the adapters with their sites, ranks and bytes, and the stacks that the bank keeps.

        Returns:
            the report, which prints as a table.
        """
        now = self._contents
        adapters = {n: now.adapters[n] for n in now.use_order}
        held, stacks = sum(s.nbytes for s in now.stacks), tuple(s.names for s in now.stacks)
        return BankReport(adapters, held, stacks, self.limits.capacity, self.limits.max_bytes)

    def __repr__(self) -> str:
        limits = f" of {self.limits.capacity}" if self.limits.capacity else ""
        names = f": {listing(map(repr, self._contents.adapters))}" if len(self) else ""
        return f"<Bank: {len(self)}{limits} adapters, {format_bytes(self.nbytes)}{names}>"
