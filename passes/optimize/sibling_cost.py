"""Compare the costs of each form of sibling layers' adapters, as expressions in the free sizes of the program.

In the stacked form, the up-projections of a group are one matmul with blocks of zeros. It takes two matmuls. The zeros
are read, and cost work in every row. In the separate form, each adapter takes two matmuls and a slice of its own. In
float32, adapters in half precision take casts and slower work.

Every matmul also has a fixed cost, about four microseconds in float32. In half precision it is five times that, since
each call prepares the matmul anew. The cost of every form is linear in the rows, so any two forms are equally fast at
one number of rows. Speeds differ between processors, so a caller that has measured them may pass them
(``SpeedByDtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import sympy
import torch

from adaptc.passes.analysis.costs import size_expression
from adaptc.passes.optimize.sibling_groups import SiblingGroup

#: the operations that run in the time of one dispatch: about four microseconds at fifty billion operations a second
DISPATCH = 200_000


@dataclass(frozen=True)
class MatmulSpeed:
    """The costs of thin matmuls of one dtype.

    ``dispatches`` is the fixed cost of each matmul, in dispatches. ``operation_cost`` is the cost of one operation, and
    ``read_cost`` that of reading one number of an adapter, both in operations of float32.
    """

    dispatches: float
    operation_cost: float
    read_cost: float = 0.0

    @property
    def fixed_cost(self) -> float:
        """Return the fixed cost of one matmul, in operations of float32."""
        return self.dispatches * DISPATCH


#: dtype of matmuls -> their speed
SpeedByDtype = Callable[[torch.dtype], MatmulSpeed]

#: HALF was measured on a processor that multiplies bfloat16: 16 to 25 microseconds for a matmul, and 300 billion
#: operations a second
FLOAT32_SPEED, HALF_SPEED = MatmulSpeed(1, 1.0), MatmulSpeed(5, 1 / 6)


def default_speed(dtype: torch.dtype) -> MatmulSpeed:
    """Return the speed that is assumed where nothing was measured."""
    return HALF_SPEED if dtype.itemsize < 4 else FLOAT32_SPEED


def stacked_cost_difference(group: SiblingGroup, rows: Any, speeds: SpeedByDtype = default_speed) -> Any:
    """Return the cost of the stacked form minus that of the separate form, for ``rows`` rows."""
    updates = [(m.width, m.update.rank) for m in group.layers if m.update is not None]
    if len(group.layers) == 1 or not updates:
        return sympy.S.Zero
    s = speeds(group.compute_dtype())
    width, rank = sum(m.width for m in group.layers), sum(r for _, r in updates)
    each = (
        2 * s.operation_cost * rows + s.read_cost
    )  # up-projections only: the down-projections cost the same in both forms
    stacked = 2 * s.fixed_cost + each * width * rank
    apart = len(updates) * (2 * s.fixed_cost + DISPATCH) + each * sum(w * r for w, r in updates)
    return stacked - apart


def float32_cost_difference(group: SiblingGroup, rows: Any, speeds: SpeedByDtype = default_speed) -> Any:
    """Return the cost in float32 minus that in the adapters' dtype, both stacked, for ``rows`` rows, or 0.

    It is 0 for a group without a choice; see :attr:`SiblingGroup.has_dtype_choice`.
    """
    if not group.has_dtype_choice:
        return sympy.S.Zero
    own, wide = speeds(group.adapter_dtype), speeds(torch.float32)
    numbers = sum(u.rank for u in group.updates) * (
        sum(m.width for m in group.layers) + int(group.x.meta["val"].shape[-1])
    )
    casts = 3 * DISPATCH / 2  # three casts, each cheaper than a matmul
    fixed = 2 * (wide.fixed_cost - own.fixed_cost) + casts + (wide.read_cost - own.read_cost) * numbers
    return fixed + 2 * (wide.operation_cost - own.operation_cost) * rows * numbers


@dataclass(frozen=True)
class BreakEven:
    """The point where two forms of all groups cost the same.

    ``below(sizes)`` returns whether the first form costs no more than the second at these values of the free sizes.
    ``rows`` is the number of rows per group up to which that holds.
    """

    prefers_first: Callable[[Mapping[str, int]], bool]
    rows: float


def find_break_even(
    groups: Sequence[SiblingGroup],
    cost: Callable[[SiblingGroup, Any, SpeedByDtype], Any],
    speeds: SpeedByDtype = default_speed,
) -> BreakEven:
    """Return the crossing of two forms, where ``cost`` gives the first form's cost minus the second's for one group."""
    rows = sympy.Symbol("rows", positive=True)
    alike = sympy.expand(sympy.Add(*(cost(g, rows, speeds) for g in groups)))
    slope = float(alike.coeff(rows, 1))
    limit = max(0.0, float(-alike.coeff(rows, 0)) / slope) if slope else inf
    return BreakEven(is_at_most(sympy.Add(*(cost(g, size_expression(g.rows), speeds) for g in groups)), 0), limit)


def is_at_most(expression: Any, limit: int) -> Callable[[Mapping[str, int]], bool]:
    """Return a function of the free sizes that tells whether the expression is at most ``limit``."""
    symbols = sorted(expression.free_symbols, key=str)
    names = [str(s) for s in symbols]
    value = sympy.lambdify(symbols, expression)
    # A size that no input has is unknown here, and counts as a large one.
    return lambda sizes: bool(value(*(sizes.get(n, 2**20) for n in names)) <= limit)


def max_row_count(groups: Sequence[SiblingGroup]) -> Any:
    """Return the largest number of rows of any group, as an expression in the free sizes."""
    return sympy.Max(*(size_expression(g.rows) for g in groups))
