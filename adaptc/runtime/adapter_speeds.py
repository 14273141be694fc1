"""How fast the thin products of adapters are here: measured once per machine, and kept like the times of products.

Before: a processor, or a table that is kept. After: :func:`adapter_speed`, by which the forms of fused adapters are
weighed. What a product costs whatever its size, what it costs to read an adapter, and what an operation costs differ
several times between processors, and with them how many rows the fewest products are worth. Nothing is measured under
``ADAPTC_PRODUCTS=plain`` or for types that the processor does not multiply: what holds then is the pass's own guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptc.passes.ir.product import ALL_CLASSES
from adaptc.passes.optimize.sibling_cost import DISPATCH, Speed, speed
from adaptc.runtime.product_table import product_table, wanted
from adaptc.runtime.product_times import ADAPTERS, FACTOR_CLASSES, FACTORS, ROWS, Times, least, measure, operands

#: seconds of an operation, in which costs are told: of those that a dispatch is worth, in its four microseconds
OPERATION = 4e-6 / DISPATCH


def adapter_speed(dtype: torch.dtype) -> Speed:
    """Of products with the factors of adapters of ``dtype``."""
    times = product_table(dtype, measure_adapters, ADAPTERS).times if wanted() else {}
    return speed_of(times) or speed(dtype)


def speed_of(times: Times) -> Speed | None:
    """What times say, as a line through few and many rows; None where they say nothing, or what cannot be."""
    (narrow, wide), (few, many) = FACTORS, FACTOR_CLASSES
    found = [times.get((*size, rows)) for rows in (few, many) for size in (narrow, wide)]
    if None in found:
        return None
    few_narrow, few_wide, many_narrow, many_wide = (sum(t) / len(t) for t in found if t is not None)
    numbers = narrow[0] * (wide[1] - narrow[1])
    rows = dict(zip(ALL_CLASSES, ROWS, strict=True))
    read = max(0.0, few_wide - few_narrow) / numbers
    work = max(0.0, (many_wide - many_narrow) / numbers - read) / (2 * rows[many])
    fixed = few_narrow - read * narrow[0] * narrow[1]
    if fixed <= 0 or work <= 0:
        return None
    return Speed(fixed / OPERATION / DISPATCH, work / OPERATION, read / OPERATION)


def measure_adapters(dtype: torch.dtype) -> Times:
    """Times of both products of an adapter, as they are made."""
    return measure(dtype, _both, ADAPTERS)


def _both(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    x, ups = operands(pool, (size[1], size[0]), rows)  # ups: (rank, width), x: (rows, width)
    low, y = pool[: rows * size[1]].view(rows, size[1]), torch.zeros_like(x)
    downs = [u.view(size) for u in ups]
    return least(
        [lambda n: torch.mm(x, downs[n % len(downs)]), lambda n: y.addmm_(low, ups[n % len(ups)])],
        end,
    )
