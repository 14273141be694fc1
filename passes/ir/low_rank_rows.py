"""Low-rank changes of a layer's output, of several adapters, each row of a batch with its own: as one operator.

    y + sum_k c[row, k] * scale[k] * (x A_k^T) B_k^T

Before: ``x`` (rows * n, *, in) and ``y`` (rows * n, *, out), whose first axis has the ``n`` of each row in one stretch;
``A`` (count, rank, in), ``B`` (count, out, rank), ``scale`` (count,) or (), and ``c`` (rows, count). After: a new
tensor of the dtype of ``y``. Two ways give it, equal up to rounding: one product with the factors of all adapters side
by side, for stretches of few positions, and a product for each stretch and each adapter that it has, where rows of the
base cost nothing and no row pays for another's adapter. The operator is for inference on any device; programs that are
exported or trained have the same in plain operators.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

#: positions of a row times adapters up to which one product with all factors is faster, and plain operators are, too
SIDE_BY_SIDE = 16

_LIBRARY = torch.library.Library("adaptc", "FRAGMENT")
_LIBRARY.define("low_rank_rows(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, Tensor c) -> Tensor")


def low_rank_rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """See the module docstring."""
    return torch.ops.adaptc.low_rank_rows(x, y, A, B, scale, c)


def weighted(h: Tensor, mix: Tensor) -> Tensor:
    """h * mix, and zero where ``mix`` is: what overflows for an adapter stays with the rows that want it."""
    return (h * mix).masked_fill(mix == 0, 0)


def side_by_side(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """One product with the factors of all adapters."""
    h = F.linear(x.to(A.dtype), A.flatten(0, 1))
    each = h.shape[0] // c.shape[0]
    mix = c.to(torch.promote_types(A.dtype, torch.float32)) * scale  # which half precision would round
    mix = mix if each == 1 else mix.repeat_interleave(each, 0)
    h = weighted(h.view(*h.shape[:-1], A.shape[0], -1), mix.view(mix.shape[0], *([1] * (h.ndim - 2)), -1, 1))
    h = h.to(A.dtype)
    return (y + F.linear(h.flatten(-2), B.transpose(0, 1).flatten(1))).to(y.dtype)


def by_stretches(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Products for the rows of each adapter alone."""
    wide = torch.promote_types(y.dtype, A.dtype)
    out = y.to(wide, copy=True) if wide != y.dtype else y.clone(memory_format=torch.contiguous_format)
    x, flat = x.to(A.dtype).reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    positions = flat.shape[0] // c.shape[0] if c.shape[0] else 0
    factors = _scales(scale)
    for first, last, k, weight in _stretches(c):
        rows = slice(first * positions, last * positions)
        h = torch.mm(x[rows], A[k].t())
        target = flat[rows]
        if h.dtype == target.dtype:
            target.addmm_(h, B[k].t(), alpha=weight * factors[k % len(factors)])
        else:
            target.add_(torch.mm(h, B[k].t()), alpha=weight * factors[k % len(factors)])
    return out.to(y.dtype)


def _computed(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    rows, width = c.shape[0], x.shape[-1]
    positions = x.numel() // (rows * width) if rows and width else 0
    few = positions * c.shape[1] <= SIDE_BY_SIDE or c.device.type != "cpu"
    return (side_by_side if few else by_stretches)(x, y, A, B, scale, c)


def _fake(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


_LIBRARY.impl("low_rank_rows", _computed, "CompositeExplicitAutograd")
torch.library.register_fake("adaptc::low_rank_rows", _fake, lib=_LIBRARY)


class _Kept(threading.local):
    """What was read of the last tensors, which are the same at all layers of a call."""

    def __init__(self) -> None:
        self.c: Any = None
        self.stretches: list[tuple[int, int, int, float]] = []
        self.version = -1


_KEPT = _Kept()


def _stretches(c: Tensor) -> list[tuple[int, int, int, float]]:
    """(first row, row after the last, adapter, weight) of rows after each other with one weight of one adapter."""
    if _KEPT.c is not None and _KEPT.c() is c and _KEPT.version == c._version:
        return _KEPT.stretches
    found: list[tuple[int, int, int, float]] = []
    for k, column in enumerate(c.t().tolist()):
        start = 0
        for row in range(1, len(column) + 1):
            if row == len(column) or column[row] != column[start]:
                if column[start]:
                    found.append((start, row, k, column[start]))
                start = row
    _KEPT.c, _KEPT.stretches, _KEPT.version = ref(c), found, c._version
    return found


def _scales(scale: Tensor) -> list[float]:
    return scale.tolist() if scale.ndim else [float(scale)]
