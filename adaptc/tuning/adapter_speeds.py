"""Measure how fast the thin matmuls of adapters are on this machine, once, and keep the times in a file.

:func:`adapter_speed` gives the costs by which the forms of fused adapters are compared. There are three: a fixed cost
of each matmul, the cost of reading an adapter's numbers, and the cost of an operation. All differ several times between
processors, and so does the number of rows up to which the form with the fewest matmuls is fastest. Nothing is measured
under ``ADAPTC_PRODUCTS=plain``, nor for dtypes that oneDNN does not multiply here. The pass's own guess holds then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptc.passes.optimize.sibling_cost import DISPATCH, MatmulSpeed, default_speed
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES
from adaptc.tuning.matmul_table import chooses_matmuls, matmul_table
from adaptc.tuning.matmul_times import (
    ADAPTERS,
    FACTOR_CLASSES,
    FACTORS,
    ROWS_OF_CLASS,
    Times,
    least_times,
    make_operands,
    measure_times,
)

#: the seconds of one operation, the unit of costs: a dispatch takes four microseconds and costs ``DISPATCH`` operations
OPERATION_SECONDS = 4e-6 / DISPATCH


def adapter_speed(dtype: torch.dtype) -> MatmulSpeed:
    """Return the speed of matmuls with adapter factors of ``dtype``, measured or guessed."""
    times = matmul_table(dtype, measure_adapters, ADAPTERS).times if chooses_matmuls() else {}
    return fit_speed(times) or default_speed(dtype)


def fit_speed(times: Times) -> MatmulSpeed | None:
    """Return the speed that ``times`` give, by a line through few and many rows.

    None where times are missing, or where noise makes a fixed cost or the cost of an operation zero or less.
    """
    (narrow, wide), (few, many) = FACTORS, FACTOR_CLASSES
    found = [times.get((*size, rows)) for rows in (few, many) for size in (narrow, wide)]
    if None in found:
        return None
    few_narrow, few_wide, many_narrow, many_wide = (sum(t) / len(t) for t in found if t is not None)
    numbers = narrow[0] * (wide[1] - narrow[1])
    rows = dict(zip(ALL_ROW_CLASSES, ROWS_OF_CLASS, strict=True))
    read = max(0.0, few_wide - few_narrow) / numbers
    work = max(0.0, (many_wide - many_narrow) / numbers - read) / (2 * rows[many])
    fixed = few_narrow - read * narrow[0] * narrow[1]
    if fixed <= 0 or work <= 0:
        return None
    return MatmulSpeed(fixed / OPERATION_SECONDS / DISPATCH, work / OPERATION_SECONDS, read / OPERATION_SECONDS)


def measure_adapters(dtype: torch.dtype) -> Times:
    """Measure both matmuls of an adapter, down and up with its addition, and return their times."""
    return measure_times(dtype, _time_factors, ADAPTERS)


def _time_factors(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    x, ups = make_operands(pool, (size[1], size[0]), rows)  # ups: (rank, width), x: (rows, width)
    low, y = pool[: rows * size[1]].view(rows, size[1]), torch.zeros_like(x)
    downs = [u.view(size) for u in ups]
    return least_times(
        [lambda n: torch.mm(x, downs[n % len(downs)]), lambda n: y.addmm_(low, ups[n % len(ups)])],
        end,
    )
