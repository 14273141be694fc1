"""What the adapters of sibling layers cost in each form, as symbolic costs in the free sizes of the program.

Stacked, the up-projections of a group are one product with blocks of zeros: two products, and work for the zeros in
every row, which are also read. Apart, each adapter is two products and a slice of its own. In float32 the adapters of
half precision take casts, and work that is slower. Every product is charged what it costs whatever its size: some four
microseconds in float32, and five times that in half precision, where a product is prepared anew in each call. All forms
are linear in the rows, so there is one number of rows where two of them meet. What is slow differs between processors,
so whoever has measured it may say (``Speeds``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import sympy
import torch

from adaptc.passes.ir.costs import size_expression
from adaptc.passes.optimize.sibling_groups import Group

#: operations that the time of one dispatch is worth: some four microseconds at fifty billion operations a second
DISPATCH = 200_000


@dataclass(frozen=True)
class Speed:
    """Of thin products of one type: ``dispatches`` that each costs whatever its size, and in operations of float32
    ``work``, what an operation costs, and ``read``, what each number of an adapter costs that is read."""

    dispatches: float
    work: float
    read: float = 0.0

    @property
    def fixed(self) -> float:
        return self.dispatches * DISPATCH


#: type of products -> how fast they are
Speeds = Callable[[torch.dtype], Speed]

#: measured on a processor that multiplies bfloat16: 16 to 25 microseconds, at 300 billion operations a second
FLOAT, HALF = Speed(1, 1.0), Speed(5, 1 / 6)


def speed(dtype: torch.dtype) -> Speed:
    """Where nothing was measured."""
    return HALF if dtype.itemsize < 4 else FLOAT


def stacking(group: Group, rows: Any, speeds: Speeds = speed) -> Any:
    """Stacked less apart, for ``rows`` rows."""
    updates = [(m.width, m.update.rank) for m in group.members if m.update is not None]
    if len(group.members) == 1 or not updates:
        return sympy.S.Zero
    s = speeds(group.computed())
    width, rank = sum(m.width for m in group.members), sum(r for _, r in updates)
    each = 2 * s.work * rows + s.read  # of the up-projections; the others are as large in both forms
    stacked = 2 * s.fixed + each * width * rank
    apart = len(updates) * (2 * s.fixed + DISPATCH) + each * sum(w * r for w, r in updates)
    return stacked - apart


def widening(group: Group, rows: Any, speeds: Speeds = speed) -> Any:
    """In float32 less as it is, both stacked, for ``rows`` rows; nothing where there is no choice."""
    if not group.narrow:
        return sympy.S.Zero
    own, wide = speeds(group.adapters), speeds(torch.float32)
    numbers = sum(u.rank for u in group.updates) * (
        sum(m.width for m in group.members) + int(group.x.meta["val"].shape[-1])
    )
    casts = 3 * DISPATCH / 2  # cheaper than products
    fixed = 2 * (wide.fixed - own.fixed) + casts + (wide.read - own.read) * numbers
    return fixed + 2 * (wide.work - own.work) * rows * numbers


@dataclass(frozen=True)
class Crossing:
    """Where two forms of all groups meet: ``below(sizes)`` says whether the first costs no more for the values of the
    free sizes, ``rows`` up to how many rows for each group it does."""

    below: Callable[[Mapping[str, int]], bool]
    rows: float


def crossing(groups: Sequence[Group], cost: Callable[[Group, Any, Speeds], Any], speeds: Speeds = speed) -> Crossing:
    """Of the first form less the second, as ``cost`` says it of one group."""
    rows = sympy.Symbol("rows", positive=True)
    alike = sympy.expand(sympy.Add(*(cost(g, rows, speeds) for g in groups)))
    slope = float(alike.coeff(rows, 1))
    limit = max(0.0, float(-alike.coeff(rows, 0)) / slope) if slope else inf
    return Crossing(at_most(sympy.Add(*(cost(g, size_expression(g.rows), speeds) for g in groups)), 0), limit)


def at_most(expression: Any, limit: int) -> Callable[[Mapping[str, int]], bool]:
    """Whether an expression in the free sizes is at most ``limit``, as a function of these sizes."""
    symbols = sorted(expression.free_symbols, key=str)
    names = [str(s) for s in symbols]
    value = sympy.lambdify(symbols, expression)
    # A size that is not an input's own counts as many.
    return lambda sizes: bool(value(*(sizes.get(n, 2**20) for n in names)) <= limit)


def most_rows(groups: Sequence[Group]) -> Any:
    """The rows of the group that has most, as an expression in the free sizes."""
    return sympy.Max(*(size_expression(g.rows) for g in groups))
