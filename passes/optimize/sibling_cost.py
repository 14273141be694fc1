"""What the adapters of sibling layers cost in each form, as symbolic costs in the free sizes of the program.

Stacked, the up-projections of a group are one product with blocks of zeros: two products, and work for the zeros in
every row. Apart, each adapter is two products and a slice of its own. In float32 the adapters of half precision take
casts, and work that is slower. Every product is charged what it costs whatever its size: some four microseconds in
float32, and five times that in half precision, where a product is prepared anew in each call. All forms are linear in
the rows, so there is one number of rows where two of them meet.
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
    """Of thin products of one type: ``dispatches`` that each costs whatever its size, and ``work``, what an operation
    costs, in operations of float32."""

    dispatches: float
    work: float

    @property
    def fixed(self) -> float:
        return self.dispatches * DISPATCH


#: measured on a processor that multiplies bfloat16: 16 to 25 microseconds, at 300 billion operations a second
FLOAT, HALF = Speed(1, 1.0), Speed(5, 1 / 6)


def speed(dtype: torch.dtype) -> Speed:
    return HALF if dtype.itemsize < 4 else FLOAT


def stacking(group: Group, rows: Any) -> Any:
    """Stacked less apart, for ``rows`` rows."""
    updates = [(m.width, m.update.rank) for m in group.members if m.update is not None]
    if len(group.members) == 1 or not updates:
        return sympy.S.Zero
    s = speed(group.computed())
    width, rank = sum(m.width for m in group.members), sum(r for _, r in updates)
    stacked = 2 * s.fixed + 2 * s.work * rows * width * rank
    apart = len(updates) * (2 * s.fixed + DISPATCH) + 2 * s.work * rows * sum(w * r for w, r in updates)
    return stacked - apart


def widening(group: Group, rows: Any) -> Any:
    """In float32 less as it is, both stacked, for ``rows`` rows; nothing where there is no choice."""
    if not group.narrow:
        return sympy.S.Zero
    rank = sum(u.rank for u in group.updates)
    work = 2 * rows * rank * (sum(m.width for m in group.members) + int(group.x.meta["val"].shape[-1]))
    wide = 2 * FLOAT.fixed + 3 * DISPATCH / 2 + FLOAT.work * work  # three casts, which are cheaper than products
    return wide - 2 * HALF.fixed - HALF.work * work


@dataclass(frozen=True)
class Crossing:
    """Where two forms of all groups meet: ``below(sizes)`` says whether the first costs no more for the values of the
    free sizes, ``rows`` up to how many rows for each group it does."""

    below: Callable[[Mapping[str, int]], bool]
    rows: float


def crossing(groups: Sequence[Group], cost: Callable[[Group, Any], Any]) -> Crossing:
    """Of the first form less the second, as ``cost`` says it of one group."""
    rows = sympy.Symbol("rows", positive=True)
    alike = sympy.expand(sympy.Add(*(cost(g, rows) for g in groups)))
    slope = float(alike.coeff(rows, 1))
    limit = float(-alike.coeff(rows, 0)) / slope if slope else inf
    return Crossing(at_most(sympy.Add(*(cost(g, size_expression(g.rows)) for g in groups)), 0), limit)


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
