"""The code of a bank: made when a call first needs it, and kept for all that follow.

Before: where the rows are in a program, or in each of its parts. After: code for stacks of adapters, as few of it as
there can be: where adapters lie side by side in products one for all numbers of them, else one for each power of two,
and for a compiler one for as many as the bank may hold.
"""

from __future__ import annotations

from collections.abc import Mapping

from adaptc.passes.ir.exclusive import on_graphs
from adaptc.program.assigned import Stack
from adaptc.rows.code import RowsSource
from adaptc.rows.limits import Limits
from adaptc.runtime.executor import Executor
from adaptc.runtime.options import RunOptions


class BankCode:
    """``sources``: what it is made of, by part; ``grouped``: ids of the sites that kernels of a GPU compute."""

    def __init__(
        self,
        sources: Mapping[str, RowsSource],
        options: RunOptions,
        limits: Limits,
        training: bool,
        grouped: frozenset[str],
    ) -> None:
        self.sources, self.grouped = sources, grouped
        self._options, self._limits, self._training = options, limits, training
        self._any_number: bool | None = None
        #: (part, number of adapters or None for any, whether rows are long) -> code
        self._made: dict[tuple[str, int | None, bool], Executor] = {}

    @property
    def compiles(self) -> bool:
        """Whether a compiler makes it."""
        return self._options.backend != "eager"

    @property
    def made(self) -> list[Executor]:
        """All that there is."""
        return list(self._made.values())

    @property
    def any_number(self) -> bool:
        """Whether it is the same for all numbers of adapters."""
        found = self._any_number
        if found is None:
            with on_graphs():
                found = not self.compiles and all(s.any_number(self.grouped) for s in self.sources.values())
                self._any_number = found
        return found

    def count(self, needed: int) -> int:
        """The number of places of a stack of so many adapters."""
        least, capacity = max(needed, 2), self._limits.capacity
        if self.compiles:
            least = max(capacity or 8, least)
        elif self._training or self.any_number:
            return least
        power = 1 << (least - 1).bit_length()
        return power if capacity is None else max(min(power, capacity), least)

    def of(self, part: str, stack: Stack, long: bool) -> Executor:
        """What computes a part of calls on a stack, of ``long`` rows or short ones."""
        free, source = self.any_number, self.sources[part]
        # Kernels are for any number of positions, and so is what is computed one adapter after the other.
        long = long and source.side_by_side and not (self.compiles or self._training or self.grouped)
        key = part, None if free else stack.count, long
        code = self._made.get(key)
        if code is None:
            with on_graphs():
                code = self._made.get(key)
                if code is None:
                    code = source.code(stack.binding, stack.count, self._options, long, self.grouped, free)
                    self._made[key] = code
        return code

    def every(self, stack: Stack) -> list[Executor]:
        """What computes calls on a stack: all parts, of rows of every length."""
        found = [self.of(part, stack, long) for part in self.sources for long in (False, True)]
        return list(dict.fromkeys(found))
