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
from adaptc.passes.protocol.matmul_op import LINEAR, onednn_matmul
from adaptc.tuning.matmul_table import MIN_SIZE, matmul_table
from adaptc.tuning.matmul_times import Times, least_times, make_operands, measure_times, unpacked_matmuls

PACKED = "packed"
#: the number of rows that the packed layout is made for; it is right for any number
PACK_ROWS = 128


_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def choose_packed(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the classes of rows at which a packed copy of a weight (out, width) is faster than the best other kind."""
    if min(out, width) < MIN_SIZE:
        return MatmulChoice(LINEAR, (), f"fewer than {MIN_SIZE} rows or columns")
    if _reorder is None:
        return MatmulChoice(LINEAR, (), "torch packs nothing here")
    found = matmul_table(dtype, measure_packed, PACKED).choose_by_class(out, width)
    if found.kind == LINEAR:
        return replace(found, reason=found.reason.replace("the fastest here", "no faster here"))
    return replace(found, kind=PACKED, reason="measured: faster than the weight as it lies")


def measure_packed(dtype: torch.dtype) -> Times:
    """Measure the best matmul on weights as they lie and the one on packed copies, and return their times."""
    return measure_times(dtype, _time_packed, PACKED)


def _time_packed(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> tuple[float, float] | None:
    x, weights = make_operands(pool, size, rows)
    copies = [pack_weight(w) for w in weights]
    best = least_times([*unpacked_matmuls(x, weights), lambda n: onednn_matmul(x, copies[n % len(copies)], None)], end)
    return None if best is None else (min(best[:-1]), best[-1])


def pack_weight(weight: Tensor) -> Tensor:
    """Return a copy of a weight (N, K) in oneDNN's packed layout: an opaque tensor of the weight's dtype."""
    return _reorder(weight.detach(), PACK_ROWS)
