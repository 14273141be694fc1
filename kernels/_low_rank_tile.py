"""Compute one tile of a matmul over the rank, for all kernels that add a low-rank term to a matrix."""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import INTERPRETED, check, check_floats
from adaptc.kernels._mixed_dot import float32_dot, plain_dot

#: ranks are packed, and the parts of h are stored, in blocks of so many columns
RANK_BLOCK = 16

# A kernel sees only constants of its own module, and of this type.
_INTERPRETED, _RANK_BLOCK = tl.constexpr(INTERPRETED), tl.constexpr(RANK_BLOCK)


@triton.jit
def tile_of(n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows and columns of this program's tile.

    Programs go row after row of tiles, so that neighbours read memory in order. The indices are int64, since an offset
    in a large matrix exceeds int32. The grid has one axis because only the first may be longer than 65535.
    """
    across = tl.cdiv(n_cols, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, cols


@triton.jit
def low_rank_tile(
    left_ptr,
    right_ptr,
    rows,
    cols,
    n_rows,
    n_cols,
    rank,
    left_row,
    left_rank,
    right_rank,
    right_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return left (n_rows, rank) @ right (rank, n_cols) at ``rows`` and ``cols``, in float32; zero beyond the edges.

    The rank is an ordinary argument and not a constant. So a swap to another rank makes no guard under torch.compile,
    and a new kernel only for another alignment.
    """
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        left_mask = (rows < n_rows)[:, None] & (k < rank)[None, :]
        right_mask = (k < rank)[:, None] & (cols < n_cols)[None, :]
        left = tl.load(left_ptr + rows[:, None] * left_row + k[None, :] * left_rank, mask=left_mask, other=0.0)
        right = tl.load(right_ptr + k[:, None] * right_rank + cols[None, :] * right_col, mask=right_mask, other=0.0)
        # The interpreter multiplies the bits of bfloat16 as integers.
        if _INTERPRETED or left.dtype != right.dtype:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        # "ieee": float32 factors must not be rounded to tf32.
        tile = tl.dot(left, right, tile, input_precision="ieee")
    return tile


@triton.jit
def row_of_h(n_ranks):
    """Return the numbers between two rows of h: whole blocks, so that loads and stores are wide for every rank."""
    return tl.cdiv(n_ranks, _RANK_BLOCK) * _RANK_BLOCK


@triton.jit
def update_tile(
    h_ptr, b_ptr, scale, bias, rows, within, n_rows, n_block, width, rank, n_parts, part_size, h_row,
    EXACT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return scale * h B^T + bias at ``rows`` and at the columns ``within`` a layer's block, in float32.

    h is the sum of ``n_parts`` parts, which are ``part_size`` numbers apart.
    """
    parts = tl.arange(0, PARTS)
    ranks = tl.arange(0, _RANK_BLOCK)
    update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, _RANK_BLOCK):
        r = start + ranks
        h = tl.zeros((BLOCK_M, _RANK_BLOCK), tl.float32)
        h_mask = (rows < n_rows)[None, :, None] & (r < rank)[None, None, :]
        for first in range(0, n_parts, PARTS):
            p = first + parts
            at = p.to(tl.int64)[:, None, None] * part_size + rows[None, :, None] * h_row + r[None, None, :]
            h += tl.sum(tl.load(h_ptr + at, mask=(p < n_parts)[:, None, None] & h_mask, other=0.0), 0)
        b_mask = (r < rank)[:, None] & (within < n_block)[None, :]
        b = tl.load(b_ptr + r.to(tl.int64)[:, None] * width + within[None, :], mask=b_mask, other=0.0)
        if b.dtype != tl.float32:
            update = plain_dot(h.to(b.dtype), b, update)
        elif EXACT:
            update = plain_dot(h, b, update)
        else:
            update = float32_dot(h, b, update)
    return scale * update + bias[None, :]


class Blocks(NamedTuple):
    """The options of a launch of a kernel on tiles, besides its arguments."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int


def blocks(left: torch.dtype, right: torch.dtype) -> Blocks:
    """Return the blocks for factors of these dtypes.

    They are the same for all shapes, so that under torch.compile neither a batch size nor a rank makes a guard. They
    are the largest whose registers do not spill where nothing is aligned, as with an odd rank.
    """
    if left == right != torch.float32:
        return Blocks(64, 128, 32, num_warps=8)
    # Exact float32 products are made outside the tensor cores and take more registers.
    return Blocks(32, 64, 16, num_warps=4)


def tiles(n_rows: int, n_cols: int, t: Blocks) -> tuple[int]:
    """Return the grid for a matrix: one axis with a program per tile."""
    return (triton.cdiv(n_rows, t.BLOCK_M) * triton.cdiv(n_cols, t.BLOCK_N),)


def check_factors(op: str, W: Tensor, A: Tensor, B: Tensor) -> None:
    """Raise BackendError unless W (out, in), A (r, in) and B (out, r) fit together."""
    check(op, W.ndim == 2, "W of shape (out, in)", tuple(W.shape))
    check(op, A.ndim == 2 and A.shape[1] == W.shape[1], f"A of shape (r, {W.shape[1]})", tuple(A.shape))
    up = W.shape[0], A.shape[0]
    check(op, tuple(B.shape) == up, f"B of shape {up}", tuple(B.shape))
    check_floats(op, W=W, A=A, B=B)


#: (dtype of a weight, dtype of its factors) that are compiled ahead of time; the last pair is how PEFT trains.
AOT_DTYPES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"))
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def aot_tile_record(
    kernel: Any, name: str, pointers: Mapping[str, str], ones: Collection[str], factors: str, **fixed: Any
) -> AotKernel:
    """Return the record of a kernel with tiles whose factors have element type ``factors``; see ``Ahead.of``."""
    t = blocks(TORCH_DTYPES[factors], TORCH_DTYPES[factors])
    return AotKernel.from_pointers(kernel, name, pointers, ones, factors != "fp32", **fixed, **t._asdict())
