"""Hold what a bank has at one moment: its adapters, the order of their use, and what calls made of them.

A :class:`Holdings` is never written to. A change makes another one, which the bank puts in place by one assignment. So
a change that is interrupted leaves the bank either as it was, or changed as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from adaptc.bank.selection import Stack
from adaptc.binding.binding import Binding

#: number of stacks that are kept, for calls that use other adapters in turn
STACKS = 2


@dataclass(frozen=True, eq=False)
class Holdings:
    """The contents of a bank at one moment.

    ``adapters``: name -> binding, in the order in which they were added. ``order``: their names, most recently used
    last. ``stacks``: the stacks that are kept, most recently used last. ``bound``: name -> that adapter bound to the
    program.
    """

    adapters: Mapping[str, Binding] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    bound: Mapping[str, Any] = field(default_factory=dict)

    def with_adapter(self, name: str, binding: Binding, gone: Collection[str] = ()) -> Self:
        """Return holdings that have ``binding`` under ``name``, new or as a replacement, and not the adapters that are
        ``gone``."""
        left = self.without(gone)
        order = (*(n for n in left.order if n != name), name)
        return replace(left, adapters={**left.adapters, name: binding}, order=order).settled()

    def without(self, names: Collection[str]) -> Self:
        """Return holdings without the adapters called ``names``."""
        left = {n: b for n, b in self.adapters.items() if n not in names}
        return replace(self, adapters=left, order=tuple(n for n in self.order if n not in names)).settled()

    def used(self, names: Collection[str]) -> Self:
        """Return holdings after a call that used the adapters ``names``, which are now the most recently used."""
        last = tuple(n for n in names if n in self.adapters)
        if self.order[len(self.order) - len(last) :] == last:
            return self
        gone = frozenset(last)
        return replace(self, order=(*(n for n in self.order if n not in gone), *last))

    def with_stack(self, stack: Stack) -> Self:
        """Return holdings with ``stack`` as the most recently used, or these holdings where one of its adapters is no
        longer in them."""
        if self.stacks[-1:] == (stack,) or any(self.adapters.get(n) is not b for n, b in stack.pairs):
            return self
        others = tuple(s for s in self.stacks if s is not stack)
        return replace(self, stacks=(*others, stack)[-STACKS:])

    def with_bound(self, name: str, bound: Any) -> Self:
        """Return holdings that keep ``bound`` under ``name``, as long as that adapter is still in them."""
        return replace(self, bound={**self.bound, name: bound}).settled()

    def settled(self) -> Self:
        """Return holdings without the stacks and bound callables whose adapters are no longer in them."""
        held = self.adapters
        stacks = tuple(s for s in self.stacks if all(held.get(n) is b for n, b in s.pairs))
        bound = {n: b for n, b in self.bound.items() if held.get(n) is b.binding}
        return replace(self, stacks=stacks, bound=bound)
