"""Make the code of a bank when a call first needs it, and keep it for later calls.

It is made for the whole program, or for each of its parts, and there is as little of it as possible. Where adapters lie
side by side in matmuls, one code serves any number of adapters. Else there is one for each power of two, and in
training one for each number. A compiler makes one for the bank's capacity; without a capacity, one for 8 adapters and
one for each power of two above.
"""

from __future__ import annotations

from collections.abc import Mapping

from adaptc.bank.capacity import Limits
from adaptc.bank.compile_bank import RowsSource
from adaptc.bank.selection import Stack
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.runtime.executor import Executor
from adaptc.runtime.options import RunOptions


class BankCode:
    """The code of a bank. ``sources``: part -> what its code is made of. ``grouped``: ids of the sites that GPU kernels
    compute."""

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
        """Return whether a compiler makes the code."""
        return self._options.backend != "eager"

    @property
    def made(self) -> list[Executor]:
        """Return all code that was made so far."""
        return list(self._made.values())

    @property
    def any_number(self) -> bool:
        """Return whether one code serves any number of adapters."""
        found = self._any_number
        if found is None:
            with on_graphs():
                found = not self.compiles and all(s.any_number(self.grouped) for s in self.sources.values())
                self._any_number = found
        return found

    def count(self, needed: int) -> int:
        """Return the number of places of a stack for ``needed`` adapters."""
        least, capacity = max(needed, 2), self._limits.capacity
        if self.compiles:
            least = max(capacity or 8, least)
        elif self._training or self.any_number:
            return least
        power = 1 << (least - 1).bit_length()
        return power if capacity is None else max(min(power, capacity), least)

    def of(self, part: str, stack: Stack, long: bool) -> Executor:
        """Return the code of a part for calls on ``stack``, made now if it was not.

        ``long``: the rows have so many positions that each row's own adapters are computed alone, see
        ``low_rank_rows``.
        """
        free, source = self.any_number, self.sources[part]
        # Code differs by the length of rows only where adapters lie side by side, and nothing else computes them:
        # GPU kernels, compiled code and training have one code for all lengths.
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
        """Return the code of all parts for calls on ``stack``, with rows of any length, made now if it was not."""
        found = [self.of(part, stack, long) for part in self.sources for long in (False, True)]
        return list(dict.fromkeys(found))
