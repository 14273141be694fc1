"""Merge a low-rank update into a weight in place, one tile at a time.

No program uses these ops yet. A bank will, to merge the adapter in use into the weights and take it out again.

    merge_(W, A, B, scale)               W <- round(W + scale * B A)
    merge_saving_(W, A, B, scale)        the same, and the old W as a new tensor, in one pass over W
    unmerge_(W, saved)                   W <- saved, bit by bit

W: (out, in), any strides without overlap; A: (r, in); B: (out, r); scale: a number or a 0-d tensor. Each tensor is
float32, bfloat16 or float16 on its own; other devices than a GPU take float64 too. A and B share no memory with W.

The sum is made in float32 and rounded to the dtype of W once. Nothing of the size of W is allocated but ``saved``. The
hardware chooses the order in which a matmul over the rank is summed up. So the sum may differ from the reference's by
the rounding of float32. Where that lies on the border between two values of W's dtype, the result differs by one unit
in the last place. Subtracting scale * B A again would not give W back: the saved values do.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import check, on_device_of, runs_kernels, scale_tensor, wrap_triton
from adaptc.kernels._low_rank_tile import (
    AOT_DTYPES,
    aot_tile_record,
    blocks,
    check_factors,
    low_rank_tile,
    tile_of,
    tiles,
)
from adaptc.op_rules import refuse_in_transforms


@triton.jit
def _merge_kernel(
    w_ptr,
    saved_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    n_rows,
    n_cols,
    rank,
    w_row,
    w_col,
    a_rank,
    a_col,
    b_row,
    b_rank,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows, cols = tile_of(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    w_address = w_ptr + rows[:, None] * w_row + cols[None, :] * w_col
    # Loaded before the matmul, which then hides the wait for memory.
    w = tl.load(w_address, mask=mask, other=0.0)
    if SAVE:
        tl.store(saved_ptr + rows[:, None] * n_cols + cols[None, :], w, mask=mask)
    scale = tl.load(scale_ptr).to(tl.float32)
    update = low_rank_tile(
        b_ptr, a_ptr, rows, cols, n_rows, n_cols, rank, b_row, b_rank, a_rank, a_col, BLOCK_M, BLOCK_N, BLOCK_R
    )
    tl.store(w_address, (w.to(tl.float32) + scale * update).to(w.dtype), mask=mask)


def _launch(W: Tensor, saved: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> None:
    (n_rows, n_cols), t = W.shape, blocks(B.dtype, A.dtype)
    if W.numel() == 0:
        return
    with on_device_of(W):
        wrap_triton(_merge_kernel)[tiles(n_rows, n_cols, t)](
            W,
            W if saved is None else saved,
            A,
            B,
            scale,
            n_rows,
            n_cols,
            A.shape[0],
            *W.stride(),
            *A.stride(),
            *B.stride(),
            SAVE=saved is not None,
            **t._asdict(),
        )


def reference_merge(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Return the merged weight as a new tensor: summed in float32 (float64 for float64), rounded once."""
    high = torch.promote_types(W.dtype, torch.float32)
    return (W.to(high) + scale.to(high) * (B.to(high) @ A.to(high))).to(W.dtype)


def _new_saved(W: Tensor) -> Tensor:
    return torch.empty_like(W, memory_format=torch.contiguous_format)


@triton_op("adaptc::merge_", mutates_args={"W"})
def _merge_op(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> None:
    if runs_kernels(W):
        _launch(W, None, A, B, scale)
    else:
        W.copy_(reference_merge(W, A, B, scale))


@triton_op("adaptc::merge_saving_", mutates_args={"W"})
def _merge_saving_op(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    saved = _new_saved(W)
    if runs_kernels(W):
        _launch(W, saved, A, B, scale)
    else:
        saved.copy_(W)
        W.copy_(reference_merge(W, A, B, scale))
    return saved


@_merge_op.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> None:
    return None


@_merge_saving_op.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return _new_saved(W)


for _name in ("merge_", "merge_saving_"):
    refuse_in_transforms(_name, "it writes to a weight in place. Merge outside, or compute W + scale * (B @ A)")


@torch.no_grad()
def merge_(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> None:
    """Set W to round(W + scale * B A), in place. Autograd does not see it.

    Raises BackendError for shapes, dtypes, devices or strides it is not defined for; W is unchanged then.
    """
    _check("merge_", W, A, B)
    _merge_op(W, A, B, scale_tensor(scale, W))


@torch.no_grad()
def merge_saving_(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Set W to round(W + scale * B A), in place, and return the old W: (out, in), contiguous, of W's dtype.

    Raises BackendError as :func:`merge_` does.
    """
    _check("merge_saving_", W, A, B)
    return _merge_saving_op(W, A, B, scale_tensor(scale, W))


@torch.no_grad()
def unmerge_(W: Tensor, saved: Tensor) -> None:
    """Write ``saved`` back to W, exactly. Raises BackendError if it is not of W's shape and dtype."""
    check("unmerge_", W.shape == saved.shape, f"saved values of shape {tuple(W.shape)}", tuple(saved.shape))
    check("unmerge_", W.dtype == saved.dtype, f"saved values in {W.dtype}, since a conversion rounds", saved.dtype)
    W.copy_(saved)


def _check(op: str, W: Tensor, A: Tensor, B: Tensor) -> None:
    check_factors(op, W, A, B)
    shared = any(stride == 0 and size > 1 for size, stride in zip(W.shape, W.stride(), strict=True))
    check(op, not shared, "a weight with memory of its own for each element (copy an expanded one)", W.stride())


def _aot_merge(weight: str, factor: str, save: bool) -> AotKernel:
    pointers = {"w_ptr": weight, "saved_ptr": weight, "a_ptr": factor, "b_ptr": factor, "scale_ptr": "fp32"}
    name = f"merge{'_saving' if save else ''}-{weight}-{factor}"
    return aot_tile_record(_merge_kernel, name, pointers, ("w_col", "a_col", "b_rank"), factor, SAVE=save)


AOT_KERNELS = [_aot_merge(*types, save=True) for types in AOT_DTYPES] + [_aot_merge("bf16", "bf16", save=False)]
