"""Where a packed weight is faster than the weight as it lies: measured once per machine, and kept like product times.

Private torch use, with the public route that was tried:
- ``torch.ops.mkldnn._reorder_linear_weight``: packs. Public: ``torch.utils.mkldnn.to_mkldnn`` packs modules, for
  tensors of its own layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.ir.product import LINEAR, onednn
from adaptc.passes.lower.choose_products import Choice
from adaptc.runtime.product_table import THIN, product_table
from adaptc.runtime.product_times import Times, as_they_lie, least, measure, operands

PACKED = "packed"
#: rows that the layout is made for; it is right for any
ROWS = 128


_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def choose_packed(out: int, width: int, dtype: torch.dtype) -> Choice:
    """At which classes of rows a weight of (out, width) is worth a packed copy, against the best of the others."""
    if min(out, width) < THIN:
        return Choice(LINEAR, (), f"fewer than {THIN} rows or columns")
    if _reorder is None:
        return Choice(LINEAR, (), "torch packs nothing here")
    found = product_table(dtype, measure_packed, PACKED).choice(out, width)
    if found.kind == LINEAR:
        return replace(found, why=found.why.replace("the fastest here", "no faster here"))
    return replace(found, kind=PACKED, why="measured: faster than the weight as it lies")


def measure_packed(dtype: torch.dtype) -> Times:
    """Times of the best product on weights as they lie, and of packed ones."""
    return measure(dtype, _kinds, PACKED)


def _kinds(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> tuple[float, float] | None:
    x, weights = operands(pool, size, rows)
    copies = [packed(w) for w in weights]
    best = least([*as_they_lie(x, weights), lambda n: onednn(x, copies[n % len(copies)], None)], end)
    return None if best is None else (min(best[:-1]), best[-1])


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight (N, K) in oneDNN's own layout, in the type that it has: it is opaque."""
    return _reorder(weight.detach(), ROWS)
