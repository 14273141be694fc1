"""Measure where a packed weight is faster than the weight as it lies, once per machine, and keep the times in a file.

Private torch use, with the public route that was tried:
- ``torch.ops.mkldnn._reorder_linear_weight``: packs. Public: ``torch.utils.mkldnn.to_mkldnn`` packs modules, for
  tensors of its own layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import LINEAR, onednn
from adaptc.tuning.matmul_table import THIN, product_table
from adaptc.tuning.matmul_times import Times, as_they_lie, least, measure, operands

PACKED = "packed"
#: the number of rows that the packed layout is made for; it is right for any number
ROWS = 128


_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def choose_packed(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the classes of rows at which a packed copy of a weight (out, width) is faster than the best other kind."""
    if min(out, width) < THIN:
        return MatmulChoice(LINEAR, (), f"fewer than {THIN} rows or columns")
    if _reorder is None:
        return MatmulChoice(LINEAR, (), "torch packs nothing here")
    found = product_table(dtype, measure_packed, PACKED).choice(out, width)
    if found.kind == LINEAR:
        return replace(found, why=found.why.replace("the fastest here", "no faster here"))
    return replace(found, kind=PACKED, why="measured: faster than the weight as it lies")


def measure_packed(dtype: torch.dtype) -> Times:
    """Measure the best matmul on weights as they lie and the one on packed copies, and return their times."""
    return measure(dtype, _kinds, PACKED)


def _kinds(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> tuple[float, float] | None:
    x, weights = operands(pool, size, rows)
    copies = [packed(w) for w in weights]
    best = least([*as_they_lie(x, weights), lambda n: onednn(x, copies[n % len(copies)], None)], end)
    return None if best is None else (min(best[:-1]), best[-1])


def packed(weight: Tensor) -> Tensor:
    """Return a copy of a weight (N, K) in oneDNN's packed layout: an opaque tensor of the weight's dtype."""
    return _reorder(weight.detach(), ROWS)
