"""Compute LoRA's up projection for sibling layers, which share their input: query, key and value, or gate and up.

    lora_up_add_siblings(y, h, B, table, scales, widths)    y' = y + scale_i * h_i B_i^T in the columns of each layer i

The layers have their W and their A stacked. So one matmul gives y (M, sum of widths), and one down projection gives h
(M, sum of ranks), both of any strides. B (sum of widths times ranks,) holds their factors transposed, (rank, width),
one after another (:func:`sibling_factors`): a program then reads few ranks of many columns.

A table (:func:`sibling_table`) says for each block of columns of y which columns of h, which part of B and which scale
belong to it. So the zeros of a block-diagonal B are neither stored nor multiplied, and ranks and scales may differ. A
swap to other ranks is another table of the same shape: nothing is compiled.

y, h, B and scales are float32, bfloat16 or float16 each on its own; other devices than a GPU take float64 too. Sums are
float32, exact for matmuls of float32 (no TF32), and y', which has y's dtype, is rounded once. No atomics: the same
inputs give the same bits. Gradients for y, h and B use torch ops and the block-diagonal matrix, since this op is for
inference. That matrix is small: it has as many columns as h.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import check, check_floats, on_device_of, runs_kernels, wrap_triton
from adaptc.kernels._low_rank_tile import AOT_DTYPES, TORCH_DTYPES, low_rank_tile
from adaptc.kernels.lora_epilogue import (
    UP_BLOCK_N,
    empty_output,
    is_empty_grid,
    lora_down,
    matmul_transposed,
    up_blocks,
)
from adaptc.op_rules import decompose_in_transforms

#: the number of fields in a table's row for a block of columns of y, in this order: its first column, its number of
#: columns, its first column within the layer, then the layer's width, first column of h, rank, begin in B, and number
FIELDS = 8

# A kernel sees only constants of its own module, and of this type.
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _siblings_kernel(
    y_ptr, h_ptr, b_ptr, table_ptr, scales_ptr, out_ptr, n_rows, n_cols, y_row, y_col, h_row, h_rank,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = table_ptr + tl.program_id(1) * _FIELDS
    first = tl.load(entry)
    n_block = tl.load(entry + 1)
    width = tl.load(entry + 3)
    b_first = tl.load(entry + 6) + tl.load(entry + 2)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
        n_block = tl.multiple_of(n_block, 16)
        width = tl.multiple_of(width, 16)
        b_first = tl.multiple_of(b_first, 16)
    h = h_ptr + tl.load(entry + 4) * h_rank
    rank = tl.load(entry + 5).to(tl.int32)
    scale = tl.load(scales_ptr + tl.load(entry + 7)).to(tl.float32)
    within = tl.arange(0, BLOCK_N).to(tl.int64)
    cols = (first + within)[None, :]
    mask = (rows < n_rows)[:, None] & (within < n_block)[None, :]
    # Loaded before the matmul, which then hides the wait for memory.
    y = tl.load(y_ptr + rows[:, None] * y_row + cols * y_col, mask=mask, other=0.0)
    update = low_rank_tile(
        h, b_ptr + b_first, rows, within, n_rows, n_block, rank, h_row, h_rank, width, 1, BLOCK_M, BLOCK_N, BLOCK_R
    )
    out = y.to(tl.float32) + scale * update
    tl.store(out_ptr + rows[:, None] * n_cols + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(y: Tensor, h: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Sequence[int]) -> Tensor:
    (n_rows, n_cols), t = y.shape, up_blocks(h.dtype, B.dtype)
    out = empty_output(y)
    if not is_empty_grid(n_rows, table.shape[0]):
        with on_device_of(y):
            wrap_triton(_siblings_kernel)[(triton.cdiv(n_rows, t["BLOCK_M"]), table.shape[0])](
                y, h, B, table, scales, out, n_rows, n_cols, *y.stride(), *h.stride(),
                ALIGNED=all(width % 16 == 0 for width in widths), **t,
            )  # fmt: skip
    return out


@triton_op("adaptc::lora_up_add_siblings", mutates_args=())
def lora_up_add_siblings(
    y: Tensor, h: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Sequence[int]
) -> Tensor:
    """Return y (M, sum of widths) plus scale_i * h_i B_i^T in the columns of each layer i: a tensor like y.

    h is (M, sum of ranks), B (sum of widths times ranks,) from :func:`sibling_factors`, ``table`` from
    :func:`sibling_table`, and scales (layers,). y, h and B have gradients.

    Raises BackendError for shapes, dtypes or devices it is not defined for. It does not check that the ranks in the
    table are those of B and h, which would wait for the device.
    """
    _check(y, h, B, table, scales, widths)
    run = _launch if runs_kernels(y) else reference_lora_up_add_siblings
    return run(y, h, B, table, scales, widths)


@lora_up_add_siblings.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Sequence[int]) -> Tensor:
    _check(y, h, B, table, scales, widths)
    return empty_output(y)


def sibling_factors(matrices: Sequence[Tensor]) -> Tensor:
    """Return up projections, each (width, rank), in the form that the op takes: (sum of widths times ranks,)."""
    return torch.cat([B.t().reshape(-1) for B in matrices])


def sibling_table(widths: Sequence[int], ranks: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the table (blocks of columns, FIELDS), int64, for layers of these widths and ranks.

    The number of blocks does not depend on the ranks. Raises BackendError unless there is a rank for each width.
    """
    check("sibling_table", len(widths) == len(ranks), "a rank for each width", f"{len(ranks)} for {len(widths)}")
    rows, column, h_column, begin = [], 0, 0, 0
    for layer, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        rows += [
            [column + first, min(UP_BLOCK_N, width - first), first, width, h_column, rank, begin, layer]
            for first in range(0, width, UP_BLOCK_N)
        ]
        column, h_column, begin = column + width, h_column + rank, begin + width * rank
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, FIELDS)


def table_of_factors(matrices: Sequence[Tensor]) -> Tensor:
    """Return the :func:`sibling_table` of these up projections, each (width, rank), on the device of the first."""
    widths, ranks = zip(*(B.shape for B in matrices), strict=True)
    return sibling_table(widths, ranks, matrices[0].device)


@custom_op("adaptc::sibling_table", mutates_args=())
def _table_op(matrices: Sequence[Tensor]) -> Tensor:
    return table_of_factors(matrices)


@_table_op.register_fake
def _(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].new_empty((sum(-(-B.shape[0] // UP_BLOCK_N) for B in matrices), FIELDS), dtype=torch.int64)


#: the table for up projections, each (width, rank), as an op: a graph that has it holds for every rank
sibling_table_op = torch.ops.adaptc.sibling_table.default


def _check(y: Tensor, h: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Sequence[int]) -> None:
    op = "lora_up_add_siblings"
    n_cols, n_blocks = sum(widths), sum(triton.cdiv(width, UP_BLOCK_N) for width in widths)
    check(op, y.ndim == 2 and y.shape[1] == n_cols, f"y of shape (M, {n_cols})", tuple(y.shape))
    check(op, h.ndim == 2 and h.shape[0] == y.shape[0], f"h of shape ({y.shape[0]}, R)", tuple(h.shape))
    check(op, B.ndim == 1 and B.is_contiguous(), "a contiguous B of one axis", f"{tuple(B.shape)}, {B.stride()}")
    rows = n_blocks, FIELDS
    check(op, table.dtype == torch.int64 and tuple(table.shape) == rows, f"a table of int64 {rows}", tuple(table.shape))
    check(op, tuple(scales.shape) == (len(widths),), f"scales of shape ({len(widths)},)", tuple(scales.shape))
    check(op, table.is_contiguous() and scales.is_contiguous(), "table and scales contiguous", "strides")
    check_floats(op, y=y, h=h, B=B)
    for name, t in (("the table", table), ("scales", scales)):
        check(op, t.device == y.device, f"{name} on {y.device}, where the other tensors are", t.device)


def _fields_by_column(table: Tensor, n_cols: int) -> tuple[Tensor, ...]:
    """Return the table's fields for each column of y, each (N,); the third is the column's place in its layer."""
    column = torch.arange(n_cols, device=table.device)
    fields = table[torch.searchsorted(table[:, 0].contiguous(), column, right=True) - 1].unbind(1)
    return *fields[:2], fields[2] + column - fields[0], *fields[3:]


def _block_diagonal(B: Tensor, table: Tensor, n_cols: int, n_ranks: int) -> Tensor:
    """Return B as a block-diagonal matrix (N, sum of ranks), by the table, without waiting for the device."""
    _, _, within, width, h_column, rank, begin, _ = (t[:, None] for t in _fields_by_column(table, n_cols))
    r = torch.arange(n_ranks, device=table.device) - h_column
    place = torch.where((r >= 0) & (r < rank), begin + r * width + within, B.shape[0])
    return torch.cat([B, B.new_zeros(1)])[place]


def _from_block_diagonal(dense: Tensor, table: Tensor, size: int) -> Tensor:
    """Return the elements of a matrix (N, sum of ranks) at the places of B's elements, in B's order: (size,)."""
    place = torch.arange(size, device=table.device)
    # A layer of rank 0 begins in B where the next one does: the last that begins there is the one with elements.
    block = torch.searchsorted(table[:, 6].contiguous(), place, right=True) - 1
    first, _, within, width, h_column, _, begin, _ = table[block].unbind(1)
    place = place - begin
    return dense[first - within + place % width, h_column + place // width]


def reference_lora_up_add_siblings(
    y: Tensor, h: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Sequence[int]
) -> Tensor:
    update = matmul_transposed(h, _block_diagonal(B, table, y.shape[1], h.shape[1]))
    return (y + scales[_fields_by_column(table, y.shape[1])[7]] * update).to(y.dtype).contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])  # y, the largest, has no part in any gradient


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    h, B, table, scales = ctx.saved_tensors
    need_y, need_h, need_B, *_ = ctx.needs_input_grad
    gh = gB = None
    scale = scales[_fields_by_column(table, g.shape[1])[7]][:, None]
    if need_h:
        scaled = (scale * _block_diagonal(B, table, g.shape[1], h.shape[1])).to(B.dtype)
        gh = lora_down(g, scaled.t()).to(h.dtype)
    if need_B:
        gB = _from_block_diagonal(scale * lora_down(g.t(), h.t()), table, B.shape[0]).to(B.dtype)
    return g if need_y else None, gh, gB, None, None, None


lora_up_add_siblings.register_autograd(_backward, setup_context=_save)
decompose_in_transforms("lora_up_add_siblings", reference_lora_up_add_siblings, nondifferentiable=(4,))
decompose_in_transforms("sibling_table", table_of_factors)


def _aot_siblings(base: str, adapter: str, aligned: bool) -> AotKernel:
    pointers = {"y_ptr": base, "h_ptr": adapter, "b_ptr": adapter, "out_ptr": base}
    pointers |= {"table_ptr": "i64", "scales_ptr": "fp32"}
    t = up_blocks(TORCH_DTYPES[adapter], TORCH_DTYPES[adapter])
    name = f"lora_up_add_siblings-{base}-{adapter}{'-aligned' if aligned else ''}"
    return AotKernel.from_pointers(
        _siblings_kernel, name, pointers, ("y_col", "h_rank"), adapter != "fp32", ALIGNED=aligned, **t
    )


AOT_KERNELS = [_aot_siblings(*types, aligned) for types in AOT_DTYPES for aligned in (False, True)]
