"""Low-rank changes of a layer's output by per-row adapters, as one operator.

    y + sum_k c[row, k] * scale[k] * (x A_k^T) B_k^T

It takes ``x`` (rows * n, *, in) and ``y`` (rows * n, *, out). In their first axis, each row has one stretch of length
``n``. ``A`` is (count, rank, in), ``B`` (count, out, rank), ``scale`` (count,) or (), and ``c`` (rows, count). It
returns a new tensor of the dtype of ``y``.

Two ways compute it, equal up to rounding. The first is one matmul with the factors of all adapters side by side, for
stretches of few positions. The second computes the rows of each adapter alone. There a row of the base costs nothing,
and no row pays for another's adapter. It makes one matmul for each stretch of rows with the same adapter. If most rows
have another adapter than the row before, one batched matmul computes all consecutive rows with one adapter each.

The operator is for inference on any device. Programs that are exported or trained have plain operators instead. Calls
of graphs go to :func:`called` and to :func:`called_in_place`, which writes to ``y`` and returns it.

The second way reads ``c`` and ``scale`` as Python numbers. Where a derivative needs them, and in transforms of
``torch.func`` and forward mode, the first way runs, which torch can follow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.op_rules import plain_in_transforms
from adaptc.torch_modes import followed

#: the most positions of a row, times adapters, at which one matmul with all factors is faster; plain operators are too
SIDE_BY_SIDE = 16

_LIBRARY = torch.library.Library("adaptc", "FRAGMENT")
_LIBRARY.define("low_rank_rows(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, Tensor c) -> Tensor")


def low_rank_rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return y + sum_k c[row, k] * scale[k] * (x A_k^T) B_k^T; the module docstring gives shapes and dtypes."""
    return torch.ops.adaptc.low_rank_rows(x, y, A, B, scale, c)


def weighted(h: Tensor, mix: Tensor) -> Tensor:
    """Return h * mix, and zero where ``mix`` is zero, so that an adapter's overflow stays in the rows that use it."""
    return (h * mix).masked_fill(mix == 0, 0)


def side_by_side(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result by one matmul with the factors of all adapters."""
    h = F.linear(x.to(A.dtype), A.flatten(0, 1))
    each = h.shape[0] // c.shape[0]
    mix = c.to(torch.promote_types(A.dtype, torch.float32)) * scale  # half precision would round c * scale
    mix = mix if each == 1 else mix.repeat_interleave(each, 0)
    h = weighted(h.view(*h.shape[:-1], A.shape[0], -1), mix.view(mix.shape[0], *([1] * (h.ndim - 2)), -1, 1))
    h = h.to(A.dtype)
    return (y + F.linear(h.flatten(-2), B.transpose(0, 1).flatten(1))).to(y.dtype)


def by_stretches(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result by matmuls for the rows of each adapter alone."""
    wide = torch.promote_types(y.dtype, A.dtype)
    out = y.to(wide, copy=True) if wide != y.dtype else y.clone(memory_format=torch.contiguous_format)
    _add_stretches(x, out, A, B, scale, c)
    return out.to(y.dtype)


def _add_stretches(x: Tensor, out: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> None:
    """Add the adapters' changes to ``out``, which must be contiguous and of the wider dtype, adapter by adapter."""
    rows = c.shape[0]
    x, flat = x.to(A.dtype).reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    positions = flat.shape[0] // rows if rows else 0
    factors = _scales(scale)
    stretches, runs = _read(c)
    for first, adapters, weights in runs:
        mixed = [w * factors[k % len(factors)] for k, w in zip(adapters, weights, strict=True)]
        alike = all(w == mixed[0] for w in mixed)
        if not alike and A.dtype.itemsize < 4:  # h * weights would round the weights to half precision
            own = enumerate(zip(adapters, weights, strict=True), first)
            stretches = [*stretches, *((i, i + 1, k, w) for i, (k, w) in own)]
            continue
        last = first + len(adapters)
        h = torch.bmm(x[first * positions : last * positions].view(-1, positions, x.shape[-1]), _of(A, adapters).mT)
        if not alike:
            h.mul_(torch.tensor(mixed, dtype=h.dtype, device=h.device).view(-1, 1, 1))
        alpha = mixed[0] if alike else 1.0
        target, up = flat[first * positions : last * positions].view(-1, positions, flat.shape[-1]), _of(B, adapters).mT
        if h.dtype == target.dtype:
            target.baddbmm_(h, up, alpha=alpha)
        else:
            target.add_(torch.bmm(h, up), alpha=alpha)
    for first, last, k, weight in stretches:
        rows_of = slice(first * positions, last * positions)
        h = torch.mm(x[rows_of], A[k].t())
        target = flat[rows_of]
        if h.dtype == target.dtype:
            target.addmm_(h, B[k].t(), alpha=weight * factors[k % len(factors)])
        else:
            target.add_(torch.mm(h, B[k].t()), alpha=weight * factors[k % len(factors)])


def _of(factors: Tensor, adapters: Sequence[int]) -> Tensor:
    """Return the factors of some adapters, as a view if the adapters are consecutive."""
    first = adapters[0]
    if list(adapters) == list(range(first, first + len(adapters))):
        return factors[first : first + len(adapters)]
    return factors[list(adapters)]


def _few(x: Tensor, c: Tensor) -> bool:
    """Return whether one matmul with all factors is the better way: few positions, or another device than the CPU."""
    rows, width = c.shape[0], x.shape[-1]
    positions = x.numel() // (rows * width) if rows and width else 0
    return positions * c.shape[1] <= SIDE_BY_SIDE or c.device.type != "cpu"


def _computed(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return (side_by_side if _few(x, c) else by_stretches)(x, y, A, B, scale, c)


def _as_numbers(*tensors: Tensor) -> bool:
    """Return whether ``scale`` and ``c``, the last two tensors, may be read as numbers: no derivative needs them."""
    return not (followed(*tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors[-2:])))


def called(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result without its dispatch."""
    return (_computed if _as_numbers(x, y, A, B, scale, c) else side_by_side)(x, y, A, B, scale, c)


def called_in_place(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result, written to the memory of ``y``; a new tensor where a derivative needs both."""
    if not _as_numbers(x, y, A, B, scale, c):
        return side_by_side(x, y, A, B, scale, c)
    if _few(x, c) or y.dtype != torch.promote_types(y.dtype, A.dtype) or not y.is_contiguous():
        return y.copy_(_computed(x, y, A, B, scale, c))
    _add_stretches(x, y, A, B, scale, c)
    return y


def _fake(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


_LIBRARY.impl("low_rank_rows", _computed, "CompositeExplicitAutograd")
torch.library.register_fake("adaptc::low_rank_rows", _fake, lib=_LIBRARY)
plain_in_transforms("low_rank_rows", side_by_side, constant=range(6))


#: (first row, row after the last, adapter, weight) of consecutive rows with one weight of one adapter
Stretches = list[tuple[int, int, int, float]]
#: (first row, the adapter of each row from there, its weight): consecutive rows that have one adapter each
Runs = list[tuple[int, list[int], list[float]]]


class _Kept(threading.local):
    """The result of reading the last coefficients, which are the same tensor at all layers of a call."""

    def __init__(self) -> None:
        self.c: Any = None
        self.found: tuple[Stretches, Runs] = [], []
        self.version = -1


_KEPT = _Kept()


def _read(c: Tensor) -> tuple[Stretches, Runs]:
    """Return the division of the rows by :func:`divided`, remembered for the last tensor ``c``."""
    if _KEPT.c is not None and _KEPT.c() is c and _KEPT.version == c._version:
        return _KEPT.found
    found = divided(c.tolist())
    _KEPT.c, _KEPT.found, _KEPT.version = ref(c), found, c._version
    return found


def divided(rows: Sequence[Sequence[float]]) -> tuple[Stretches, Runs]:
    """Return the stretches and runs of rows that add each row's adapters once, given the coefficients (rows, count).

    Runs are used only where most stretches would hold a single row.
    """
    stretches: Stretches = []
    for k in range(len(rows[0]) if rows else 0):
        start = 0
        for row in range(1, len(rows) + 1):
            if row == len(rows) or rows[row][k] != rows[start][k]:
                if rows[start][k]:
                    stretches.append((start, row, k, rows[start][k]))
                start = row
    alone = sum(last - first == 1 for first, last, _, _ in stretches)
    if 2 * alone <= len(stretches) or len(stretches) < 2:
        return stretches, []
    runs: Runs = []
    owned = {i: k for i, row in enumerate(rows) if len(k := [j for j, w in enumerate(row) if w]) == 1}
    for i in sorted(owned):
        (k,) = owned[i]
        if not runs or runs[-1][0] + len(runs[-1][1]) != i:
            runs.append((i, [], []))
        runs[-1][1].append(k)
        runs[-1][2].append(rows[i][k])
    runs = [run for run in runs if len(run[1]) > 1]
    inside = {i for first, adapters, _ in runs for i in range(first, first + len(adapters))}
    rest = [(i, i + 1, k, w) for i, row in enumerate(rows) if i not in inside for k, w in enumerate(row) if w]
    return rest, runs


def _scales(scale: Tensor) -> list[float]:
    return scale.tolist() if scale.ndim else [float(scale)]
