"""Compute LoRA for a batch whose rows belong to different adapters, each of its own rank.

:mod:`adaptc.kernels.grouped_rows` uses these ops for banks, which mix adapters row by row.

    out[t] = y[t] + scales[i] * (x[t] A_i^T) B_i        with i = index[t]; out[t] = y[t] where index[t] is -1

x (T, K) and y (T, N) are rows of the input and of the output of a layer. A *bank* has the factors of n adapters, the
ranks of one below those of another. A is (S, K), B is (S, N), and adapter i has rows starts[i] to starts[i + 1] of
both. So B_i is the transpose of the factor that a LoRA layer holds. A program then reads few ranks of many columns,
while from (N, S) it would read a few numbers of each of many rows.

``starts`` is (n + 1,) int32, ``scales`` (n,) float32, ``index`` (T,) int32 or int64. x, y, A and B are float32,
bfloat16 or float16, each on its own; on the CPU they and ``scales`` may be float64.

The computation has three matmuls, each a kernel and an op on *chunks* (:mod:`adaptc.kernels._row_chunks`). Each is a
derivative of the others, so gradients of any order need no more:

    grouped_shrink  h[p]   = x[order[p]] A_i^T             (T, R) float32, at sorted positions p
    grouped_expand  out[t] = y[t] + scales[i] * h[p] B_i   with t = order[p]
    grouped_outer   A_i    = sum over p of h[p]^T x[order[p]]

Ranks are not padded: in a row of h only the columns below its adapter's rank are written or read, and tiles beyond it
are not visited. Sums are float32 and out is rounded once. Matmuls of float32, and of two dtypes, are exact float32 (no
TF32). Where h meets a bank in half precision, it counts with 16 bits of precision or more. No atomics: the same inputs
give the same bits, and the order of the rows changes none. Rows of the base are copied bit by bit.

A row whose adapter does not exist, or has a higher rank than was allowed for, comes out as NaN. To raise an error would
wait for the device.

Sources: Punica (arXiv:2310.18547), S-LoRA (arXiv:2311.03285).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.kernels._grouped_products import launch_expand, launch_outer, launch_shrink
from adaptc.kernels._launch import check, check_floats, runs_kernels
from adaptc.kernels._row_chunks import (
    Chunks,
    chunk_count,
    cut_into_chunks,
    position_adapters,
    reference_grouped_expand,
    reference_grouped_outer,
    reference_grouped_shrink,
    rows_per_chunk,
    sum_dtype,
    take_per_adapter,
)
from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_typing import to_python, triton_op

__all__ = [
    "Chunks",
    "cut_into_chunks",
    "grouped_expand",
    "grouped_lora",
    "grouped_outer",
    "grouped_shrink",
    "reference_grouped_lora",
    "rows_per_chunk",
]


def _may_be_equal(size: Any, expected: Any) -> bool:
    """Return whether two sizes are equal; symbolic sizes count as equal unless they are known to differ."""
    return not statically_known_true(size != expected)


def _check(
    op: str, x: Tensor, bank: Tensor, starts: Tensor, table: Chunks, chunk: int,
    h: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise BackendError for tensors that a kernel would misread, or read beyond the end of."""
    check_floats(op, x=x, bank=bank)
    check(op, x.dim() == 2 and bank.dim() == 2, "rows and a bank of two dimensions", (x.dim(), bank.dim()))
    check(
        op, _may_be_equal(bank.shape[1], x.shape[1]), f"a bank of {x.shape[1]} columns, as the rows have", bank.shape[1]
    )
    check(op, starts.dim() == 1 and starts.shape[0] > 0, "starts of (adapters + 1,)", tuple(starts.shape))
    for name, t in zip(("starts", *Chunks._fields), (starts, *table), strict=True):
        check(op, t.dtype == torch.int32 and t.is_contiguous(), f"{name} contiguous and in int32", t.dtype)
        check(op, t.device == x.device, f"{name} on {x.device}, where the rows are", t.device)
    check(op, 0 < chunk <= 64, "chunks of 1 to 64 rows, which one program holds", chunk)
    n_rows, n = x.shape[0], starts.shape[0] - 1
    count = chunk_count(n_rows, n, chunk)
    check(op, _may_be_equal(table.order.shape[0], n_rows), f"chunks of {n_rows} rows", table.order.shape[0])
    for t in table[1:]:
        check(
            op,
            _may_be_equal(t.shape[0], count),
            f"{count} chunks, as cut_into_chunks(index, n, {chunk}) makes",
            t.shape[0],
        )
    if h is not None:
        check_floats(op, x=x, h=h)
        check(op, h.dim() == 2 and _may_be_equal(h.shape[0], n_rows), f"h of {n_rows} rows", tuple(h.shape))
        check(op, h.dtype == torch.float32 or not runs_kernels(h), "h in float32", h.dtype)
    if scales is not None:
        check_floats(op, x=x, scales=scales)
        check(op, scales.dim() == 1 and _may_be_equal(scales.shape[0], n), f"{n} scales", tuple(scales.shape))


@triton_op("adaptc::grouped_shrink", mutates_args=())
def grouped_shrink(
    x: Tensor, bank: Tensor, starts: Tensor, order: Tensor, adapter: Tensor, start: Tensor, length: Tensor,
    chunk: int, max_rank: int,
) -> Tensor:  # fmt: skip
    """Return h (T, max_rank) in float32: x (T, K) times the rows in the bank (S, K) of each row's own adapter.

    Columns beyond the rank of a row's adapter are undefined.
    """
    table = Chunks(order, adapter, start, length)
    _check("grouped_shrink", x, bank, starts, table, chunk)
    if runs_kernels(x):
        return launch_shrink(x, bank, starts, table, chunk, max_rank)
    return reference_grouped_shrink(x, bank, starts, table, chunk, max_rank)


@triton_op("adaptc::grouped_expand", mutates_args=())
def grouped_expand(
    y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor,
    order: Tensor, adapter: Tensor, start: Tensor, length: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    """Return y (T, N) plus the scaled matmul of h (T, R) with the bank's rows of each row's own adapter, in y's dtype.

    The bank is (S, N), and h is float32.
    """
    table = Chunks(order, adapter, start, length)
    _check("grouped_expand", y, bank, starts, table, chunk, h, scales)
    if runs_kernels(y):
        return launch_expand(y, h, bank, starts, scales, table, chunk)
    return reference_grouped_expand(y, h, bank, starts, scales, table, chunk)


@triton_op("adaptc::grouped_outer", mutates_args=())
def grouped_outer(
    h: Tensor, v: Tensor, starts: Tensor, order: Tensor, adapter: Tensor, start: Tensor, length: Tensor,
    chunk: int, n_rows: int,
) -> Tensor:  # fmt: skip
    """Return (n_rows, W) in float32: for each rank of each adapter the sum of v (T, W), weighted by h (T, R).

    A sum is over the rows of its own adapter. h is float32.
    """
    table = Chunks(order, adapter, start, length)
    _check("grouped_outer", v, v, starts, table, chunk, h)
    if runs_kernels(v):
        return launch_outer(h, v, starts, table, n_rows)
    return reference_grouped_outer(h, v, starts, table, chunk, n_rows)


@grouped_shrink.register_fake
def _(
    x: Tensor, bank: Tensor, starts: Tensor, order: Tensor, adapter: Tensor, start: Tensor, length: Tensor,
    chunk: int, max_rank: int,
) -> Tensor:  # fmt: skip
    _check("grouped_shrink", x, bank, starts, Chunks(order, adapter, start, length), chunk)
    return x.new_empty((x.shape[0], max_rank), dtype=sum_dtype(x, bank))


@grouped_expand.register_fake
def _(
    y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor,
    order: Tensor, adapter: Tensor, start: Tensor, length: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    _check("grouped_expand", y, bank, starts, Chunks(order, adapter, start, length), chunk, h, scales)
    return y.new_empty(y.shape)


@grouped_outer.register_fake
def _(
    h: Tensor, v: Tensor, starts: Tensor, order: Tensor, adapter: Tensor, start: Tensor, length: Tensor,
    chunk: int, n_rows: int,
) -> Tensor:  # fmt: skip
    _check("grouped_outer", v, v, starts, Chunks(order, adapter, start, length), chunk, h)
    return v.new_empty((n_rows, v.shape[1]), dtype=sum_dtype(h, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors)


def _shrink_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bank, starts, *rest = ctx.saved_tensors
    table = Chunks(*rest)
    dx = dbank = None
    if ctx.needs_input_grad[0]:
        dx = _expand_unscaled(x, grad, bank, starts, table, ctx.chunk)
    if ctx.needs_input_grad[1]:
        dbank = grouped_outer(grad, x, starts, *table, ctx.chunk, bank.shape[0]).to(bank.dtype)
    return dx, dbank, *[None] * 7


def _expand_unscaled(like: Tensor, h: Tensor, bank: Tensor, starts: Tensor, table: Chunks, chunk: int) -> Tensor:
    """Return the matmul that grouped_expand adds to y, unscaled, with the shape and dtype of ``like``."""
    zero = like.new_zeros((1, like.shape[1])).expand(like.shape)
    ones = torch.ones(starts.shape[0] - 1, device=like.device)
    return grouped_expand(zero, h, bank, starts, ones, *table, chunk)


def _save_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, bank, starts, scales, *rest = ctx.saved_tensors
    table = Chunks(*rest)
    adapter = position_adapters(table)
    scale = take_per_adapter(scales, adapter)[:, None]
    own = torch.arange(h.shape[1], device=h.device) < take_per_adapter(torch.diff(starts), adapter)[:, None]
    dh = dbank = dscales = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
        # Beyond the adapter's rank memory may hold anything. NaN times 0 would reach the sums, so zeros replace it.
        product = torch.where(own, grouped_shrink(grad, bank, starts, *table, ctx.chunk, h.shape[1]), 0)
        h = torch.where(own, h, 0)
        dh = (product * scale).to(h.dtype)
        each = torch.arange(scales.shape[0], device=h.device)[:, None] == adapter
        dscales = torch.where(each, (product * h).sum(1), 0).sum(1).to(scales.dtype)
    if ctx.needs_input_grad[2]:
        dbank = grouped_outer(h * scale, grad, starts, *table, ctx.chunk, bank.shape[0]).to(bank.dtype)
    return grad, dh, dbank, None, dscales, *[None] * 5


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, v, starts, *rest = ctx.saved_tensors
    table = Chunks(*rest)
    dh = grouped_shrink(v, grad, starts, *table, ctx.chunk, h.shape[1]).to(h.dtype)
    return dh, _expand_unscaled(v, h, grad, starts, table, ctx.chunk), *[None] * 7


grouped_shrink.register_autograd(_shrink_backward, setup_context=_save)
grouped_expand.register_autograd(_expand_backward, setup_context=_save_expand)
grouped_outer.register_autograd(_outer_backward, setup_context=_save)


def _plain_shrink(x: Tensor, bank: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    *table, chunk, max_rank = rest
    return reference_grouped_shrink(x, bank, starts, Chunks(*table), chunk, max_rank)


def _plain_expand(y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    *table, chunk = rest
    return reference_grouped_expand(y, h, bank, starts, scales, Chunks(*table), chunk)


def _plain_outer(h: Tensor, v: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    *table, chunk, n_rows = rest
    return reference_grouped_outer(h, v, starts, Chunks(*table), chunk, n_rows)


decompose_in_transforms("grouped_shrink", _plain_shrink)
decompose_in_transforms("grouped_expand", _plain_expand)
decompose_in_transforms("grouped_outer", _plain_outer)


def grouped_lora(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scales: Tensor, index: Tensor | Chunks,
    *, max_rank: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Return y (T, N) plus the update of each row's adapter, as the module docstring says.

    It is differentiable in x, y, A, B and ``scales``. Layers of one batch can share
    ``cut_into_chunks(index, n_adapters, chunk)``, given as ``index``, along with the same ``chunk`` (by default
    ``rows_per_chunk(T)``).

    ``max_rank`` is the highest rank that ``starts`` may have. None reads it from ``starts``, which waits for the
    device: give it inside torch.compile and CUDA graphs. Raises BackendError for shapes, dtypes or devices that do not
    fit.
    """
    n = starts.shape[0] - 1
    # Shapes and no f-string with a size: torch.compile would make the size a constant.
    check("grouped_lora", _may_be_equal(A.shape[0], B.shape[0]), "as many rows in B as in A", (B.shape, A.shape))
    check("grouped_lora", _may_be_equal(x.shape[0], y.shape[0]), "as many rows in y as in x", (y.shape, x.shape))
    chunk = rows_per_chunk(x.shape[0]) if chunk is None else chunk
    table = index if isinstance(index, Chunks) else cut_into_chunks(index, n, chunk)
    if max_rank is None:
        max_rank = int(torch.diff(starts).max()) if n > 0 else 0
    h = grouped_shrink(x, A, starts, *table, chunk, max_rank)
    return grouped_expand(y, h, B, starts, scales, *table, chunk)


def reference_grouped_lora(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scales: Tensor, index: Tensor
) -> Tensor:
    """Return the result of :func:`grouped_lora`, computed adapter by adapter."""
    dtype, out, edges = sum_dtype(x, y, A, B), y.clone(), to_python(starts)
    for i, (start, end) in enumerate(pairwise(edges)):
        rows = (index == i).nonzero().squeeze(1)
        if start < end:
            delta = (x[rows].to(dtype) @ A[start:end].to(dtype).T) @ B[start:end].to(dtype)
            out[rows] = (y[rows].to(dtype) + scales[i].to(dtype) * delta).to(y.dtype)
    return out
