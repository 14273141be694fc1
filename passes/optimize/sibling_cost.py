"""When it pays to stack the adapters of sibling layers: a symbolic cost in the free sizes of the program.

Stacked, the up-projections of a group are one product with blocks of zeros: two operators, and work for the zeros in
every row. Apart, each adapter is three operators of its own. An operator is charged what its dispatch costs in
multiplications of the hardware; both sides are linear in the rows, so there is one number of rows where they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import sympy

from adaptc.passes.ir.costs import size_expression
from adaptc.passes.optimize.sibling_groups import Group

#: operations that the time of one dispatch is worth: some four microseconds at fifty billion operations a second
DISPATCH = 200_000


def costs(group: Group, rows: Any) -> Any:
    """Stacked less apart: operations for ``rows`` rows, dispatches included."""
    updates = [(m.width, int(m.update.up.meta["val"].shape[1])) for m in group.members if m.update is not None]
    if len(group.members) == 1 or not updates:
        return sympy.S.Zero
    width, rank = sum(m.width for m in group.members), sum(r for _, r in updates)
    stacked = 2 * DISPATCH + 2 * rows * width * rank
    apart = 3 * len(updates) * DISPATCH + 2 * rows * sum(w * r for w, r in updates)
    return stacked - apart


def stacked_is_cheaper(groups: Sequence[Group]) -> tuple[Callable[[Mapping[str, int]], bool], float]:
    """(a function of the free sizes that says whether to stack; the rows per group up to which it does)."""
    rows = sympy.Symbol("rows", positive=True)
    alike = sympy.expand(sympy.Add(*(costs(g, rows) for g in groups)))
    slope = float(alike.coeff(rows, 1))
    limit = float(-alike.coeff(rows, 0)) / slope if slope else inf
    difference = sympy.Add(*(costs(g, size_expression(g.rows)) for g in groups))
    return at_most(difference, 0), limit


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
