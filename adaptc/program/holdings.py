"""What a bank holds: its adapters, the order of their use, and what calls made of them, as one value.

Before: the holdings of a moment. After: others, made aside, which the bank puts in their place by one assignment, so
that whatever is interrupted leaves the one or the other. Nothing in one of these is ever written to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from adaptc.binding.binding import Binding
from adaptc.program.assigned import Stack

#: stacks that are kept: of the calls that differ most from each other in what they use
STACKS = 2


@dataclass(frozen=True, eq=False)
class Holdings:
    """``adapters`` by name, as they came; ``order``: their names, those used last at the end; ``stacks``: likewise;
    ``bound``: what was bound to the program, by name."""

    adapters: Mapping[str, Binding] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    bound: Mapping[str, Any] = field(default_factory=dict)

    def with_adapter(self, name: str, binding: Binding, gone: Collection[str] = ()) -> Self:
        """With an adapter, new or in the place of one, and without those that are ``gone`` for it."""
        left = self.without(gone)
        order = (*(n for n in left.order if n != name), name)
        return replace(left, adapters={**left.adapters, name: binding}, order=order).settled()

    def without(self, names: Collection[str]) -> Self:
        """Without these adapters."""
        left = {n: b for n, b in self.adapters.items() if n not in names}
        return replace(self, adapters=left, order=tuple(n for n in self.order if n not in names)).settled()

    def used(self, names: Collection[str]) -> Self:
        """After a call that used these."""
        last = tuple(n for n in names if n in self.adapters)
        if self.order[len(self.order) - len(last) :] == last:
            return self
        gone = frozenset(last)
        return replace(self, order=(*(n for n in self.order if n not in gone), *last))

    def with_stack(self, stack: Stack) -> Self:
        """With a stack as the one used last, where its adapters are held still."""
        if self.stacks[-1:] == (stack,) or any(self.adapters.get(n) is not b for n, b in stack.pairs):
            return self
        others = tuple(s for s in self.stacks if s is not stack)
        return replace(self, stacks=(*others, stack)[-STACKS:])

    def with_bound(self, name: str, bound: Any) -> Self:
        """With what was bound to the program, where its adapter is held still."""
        return replace(self, bound={**self.bound, name: bound}).settled()

    def settled(self) -> Self:
        """Without what was made of adapters that are not, or no longer, held."""
        held = self.adapters
        stacks = tuple(s for s in self.stacks if all(held.get(n) is b for n, b in s.pairs))
        bound = {n: b for n, b in self.bound.items() if held.get(n) is b.binding}
        return replace(self, stacks=stacks, bound=bound)
