"""Compute per-row adapters of a bank, by the matmuls of :mod:`adaptc.kernels.grouped_lora`.

    y + sum_k c[row, k] * scale[2 k] * (x A_k^T) B_k^T

``x`` is (rows * n, *, K) and ``y`` (rows * n, *, N); the ``n`` entries of a batch row are consecutive. ``A`` is
(count, R, K). ``B`` is (count, N, R), and lies in memory as (count, R, N): the kernels read the ranks of one adapter
below those of another. ``c`` is (rows, count). The result is a new tensor of y's dtype.

``starts`` is (2 count + 1,) int32. Adapter k has the ranks from starts[2 k] to starts[2 k + 1]. Those from there to
starts[2 k + 2] are padding, which nothing reads. ``scale`` has a number for each of these 2 count stretches.

A row without an adapter is copied, and a row pays only for the rank of its own adapter. Rows that mix adapters take one
pass per adapter, and sums stay in float32 between passes. The grouping of rows is computed on the CPU, once for each
tensor ``c``. All layers of a call, and all calls of a generation, share one.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from adaptc.kernels._grouped_products import launch_expand, launch_shrink
from adaptc.kernels._launch import check, check_floats, runs_kernels
from adaptc.kernels._row_chunks import Chunks, cut_into_chunks, rows_per_chunk, sum_dtype
from adaptc.kernels.grouped_lora import grouped_expand, grouped_shrink
from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_modes import has_transform_or_tangent, in_dispatch_mode, outside_modes
from adaptc.torch_typing import untyped_library

_LIBRARY = untyped_library.Library("adaptc", "FRAGMENT")
_LIBRARY.define("grouped_rows(Tensor x, Tensor y, Tensor A, Tensor B, Tensor starts, Tensor scale, Tensor c) -> Tensor")

#: rows by the adapter that each has in one pass, the size of chunks, and (T, 1) what each counts; None where all 1
GroupedPass = tuple[Chunks, int, Tensor | None]


def grouped_rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return y plus the updates of each row's adapters, as the module docstring says.

    Raises BackendError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.adaptc.grouped_rows(x, y, A, B, starts, scale, c)


def _check_and_group(x: Tensor, y: Tensor, A: Tensor, starts: Tensor, c: Tensor) -> list[GroupedPass]:
    """Return the passes of a call, after a check of sizes that the matmuls would not see."""
    count, rows, T = A.shape[0], c.shape[0], prod(x.shape[:-1])
    check("grouped_rows", starts.shape[0] == 2 * count + 1, f"starts of {2 * count + 1}", tuple(starts.shape))
    check("grouped_rows", not T or (rows > 0 and T % rows == 0), f"as many for each of {rows} rows", T)
    return _cached_passes(c, T) if T else []


def _bank_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as the matmuls read them, the ranks of one adapter below those of another."""
    return A.reshape(-1, A.shape[2]), B.transpose(1, 2).reshape(-1, B.shape[1])


def _compute(x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    passes, (down, up) = _check_and_group(x, y, A, starts, c), _bank_factors(A, B)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if len(passes) > 1:
        y_rows = y_rows.to(torch.promote_types(y_rows.dtype, torch.float32))
    for table, chunk, weight in passes:
        h = grouped_shrink(x_rows, down, starts, *table, chunk, A.shape[1])
        h = h if weight is None else h * weight.to(h.dtype)
        y_rows = grouped_expand(y_rows, h, up, starts, scale, *table, chunk)
    return y_rows.to(y.dtype).reshape(y.shape) if passes else y.clone(memory_format=torch.contiguous_format)


def grouped_rows_in_place(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor
) -> Tensor:
    """Return the op's result, written to the memory of ``y``. Rows of the base are neither read nor written.

    The result is a new tensor where a derivative needs both, and where sums need more than y's dtype.
    """
    tensors = x, y, A, B, starts, scale, c
    needs_y = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if needs_y or in_dispatch_mode() or has_transform_or_tangent(*tensors):
        return grouped_rows(*tensors)
    passes = _check_and_group(x, y, A, starts, c) if runs_kernels(x) and y.is_contiguous() else []
    if len(passes) != 1:
        return _compute(*tensors)
    check_floats("grouped_rows", x=x, y=y, A=A, B=B, scale=scale)
    (table, chunk, weight), (down, up) = passes[0], _bank_factors(A, B)
    h = launch_shrink(x.reshape(-1, x.shape[-1]), down, starts, table, chunk, A.shape[1])
    h = h if weight is None else h * weight
    launch_expand(y.view(-1, y.shape[-1]), h, up, starts, scale, table, chunk, in_place=True)
    return y


def _fake(x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


_LIBRARY.impl("grouped_rows", _compute, "CompositeExplicitAutograd")
untyped_library.register_fake("adaptc::grouped_rows", _fake, lib=_LIBRARY)


def reference_grouped_rows(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor
) -> Tensor:
    """Return the result of :func:`grouped_rows` by plain ops, which multiply every row by every adapter's factors."""
    ranks, dtype = torch.diff(starts)[::2], sum_dtype(x, y, A)
    own = (torch.arange(A.shape[1], device=A.device) < ranks[:, None])[:, :, None]
    down, up = A.where(own, 0).to(dtype), B.where(own.mT, 0).to(dtype)
    mix = (c.to(dtype) * scale[::2].to(dtype)).repeat_interleave(x.shape[0] // max(c.shape[0], 1), 0)
    mix = mix.view(mix.shape[0], *([1] * (x.ndim - 2)), -1, 1)
    h: Any = x.to(dtype) @ down.flatten(0, 1).t()  # torch gives unflatten no types
    h = h.unflatten(-1, A.shape[:2])
    h = (h * mix).masked_fill(mix == 0, 0)
    return (y.to(dtype) + h.flatten(-2) @ up.transpose(0, 1).flatten(1).t()).to(y.dtype)


decompose_in_transforms("grouped_rows", reference_grouped_rows, nondifferentiable=range(7))


class _PassCache(threading.local):
    """The grouping of rows for the last coefficients ``c`` of a thread, by the number of positions.

    Its tensors belong to the CUDA stream on which they were made, so another stream makes its own.
    """

    def __init__(self) -> None:
        self.coefficients: Any = None
        self.version, self.stream = -1, 0
        self.passes: dict[int, list[GroupedPass]] = {}


_PASS_CACHE = _PassCache()


def _cached_passes(c: Tensor, T: int) -> list[GroupedPass]:
    stream = torch.cuda.current_stream(c.device).cuda_stream if c.is_cuda else 0
    if (
        _PASS_CACHE.coefficients is None
        or _PASS_CACHE.coefficients() is not c
        or (_PASS_CACHE.version, _PASS_CACHE.stream) != (c._version, stream)
    ):
        _PASS_CACHE.coefficients, _PASS_CACHE.version, _PASS_CACHE.stream, _PASS_CACHE.passes = (
            ref(c),
            c._version,
            stream,
            {},
        )
    found = _PASS_CACHE.passes.get(T)
    if found is None:
        with outside_modes():
            found = _PASS_CACHE.passes[T] = _make_passes(c, T)
    return found


def _make_passes(c: Tensor, T: int) -> list[GroupedPass]:
    left, (rows, count), chunk = c.detach().cpu().clone(), c.shape, rows_per_chunk(T)
    passes: list[GroupedPass] = []
    while bool(left.any()):
        size, k = left.abs().max(1)
        weight = left.gather(1, k[:, None])
        left.scatter_(1, k[:, None], 0)
        index = torch.where(size > 0, 2 * k, -1).repeat_interleave(T // rows)
        table = cut_into_chunks(index, 2 * count, chunk)
        each = None
        if bool((weight[size > 0] != 1).any()):
            each = weight.repeat_interleave(T // rows, 0)[table.order].to(c.device)
        passes.append((Chunks(*(t.to(c.device) for t in table)), chunk, each))
    return passes
