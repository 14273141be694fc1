"""Compute DoRA's two extra steps over LoRA (Liu et al., arXiv 2402.09353): row norms of W + s B A, and an output gain.

    dora_norm(W, A, B, scale)                  n = |W + s B A| row by row, float32, (out,)
    dora_epilogue(y0, h, B, g, scale, b)       y = g (y0 + s h B^T) + b

W: (out, in); A: (r, in); B: (out, r); h = x A^T: (..., r); y0 = x W^T without bias: (..., out); g = m / n and the
optional bias b: (out,); all with any strides; scale: a number or a 0-d tensor. Each tensor is float32, bfloat16 or
float16 on its own; other devices than a GPU take float64 too. Sums are made in float32, and results rounded once.

Norms. |w|^2 + 2 s <w, v> + s^2 |v|^2, with v the row of B A, needs no more than W A^T and A A^T. But its terms cancel
where s v is near -w. Their rounding, of the order of eps |w|^2, may then exceed the norm, or turn the sum negative. So
each tile of B A is made in registers, added to the tile of W, and squared after the sum. Squares do not cancel. The
only error beyond a few eps is that of the sum W + s B A itself, as if made in float32 and stored. W is read once. One
number per row and tile is written, and these are summed up in an order that no scheduling changes.

Gradients. DoRA takes the norm for a constant, so dora_norm has none; dora_epilogue has those of all its tensors.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import check, check_floats, on_device_of, runs_kernels, scale_tensor, wrap_triton
from adaptc.kernels._low_rank_tile import (
    AOT_DTYPES,
    aot_tile_record,
    blocks,
    check_factors,
    low_rank_tile,
    tile_of,
    tiles,
)
from adaptc.op_rules import decompose_in_transforms


# The rank, and the stride of B that follows from it, change with each adapter. Specialised, they would compile another
# kernel where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["rank", "b_row"])
def _squares_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    sums_ptr,
    n_rows,
    n_cols,
    rank,
    w_row,
    w_col,
    a_rank,
    a_col,
    b_row,
    b_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows, cols = tile_of(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    # Loaded before the matmul, which then hides the wait for memory.
    w = tl.load(w_ptr + rows[:, None] * w_row + cols[None, :] * w_col, mask=mask, other=0.0)
    scale = tl.load(scale_ptr).to(tl.float32)
    update = low_rank_tile(
        b_ptr, a_ptr, rows, cols, n_rows, n_cols, rank, b_row, b_rank, a_rank, a_col, BLOCK_M, BLOCK_N, BLOCK_R
    )
    turned = w.to(tl.float32) + scale * update
    tile = tl.program_id(0) % tl.cdiv(n_cols, BLOCK_N)
    tl.store(sums_ptr + tile.to(tl.int64) * n_rows + rows, tl.sum(turned * turned, axis=1), mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "rank", "h_row", "b_row"])
def _epilogue_kernel(
    base_ptr,
    h_ptr,
    b_ptr,
    gain_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_cols,
    rank,
    base_row,
    base_col,
    h_row,
    h_rank,
    b_row,
    b_rank,
    gain_col,
    bias_col,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows, cols = tile_of(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    base = tl.load(base_ptr + rows[:, None] * base_row + cols[None, :] * base_col, mask=mask, other=0.0)
    gain = tl.load(gain_ptr + cols * gain_col, mask=cols < n_cols, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    update = low_rank_tile(
        h_ptr, b_ptr, rows, cols, n_rows, n_cols, rank, h_row, h_rank, b_rank, b_row, BLOCK_M, BLOCK_N, BLOCK_R
    )
    y = gain[None, :] * (base.to(tl.float32) + scale * update)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols * bias_col, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], y.to(base.dtype), mask=mask)


def _launch_squares(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Return the sums of squares of each row, by tile of columns: (tiles, out), float32."""
    (n_rows, n_cols), t = W.shape, blocks(B.dtype, A.dtype)
    sums = W.new_empty((triton.cdiv(n_cols, t.BLOCK_N), n_rows), dtype=torch.float32)
    if sums.numel() == 0:
        return sums
    with on_device_of(W):
        wrap_triton(_squares_kernel)[tiles(n_rows, n_cols, t)](
            W,
            A,
            B,
            scale,
            sums,
            n_rows,
            n_cols,
            A.shape[0],
            *W.stride(),
            *A.stride(),
            *B.stride(),
            **t._asdict(),
        )
    return sums


def _launch_epilogue(y0: Tensor, h: Tensor, B: Tensor, g: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    out = torch.empty_like(y0, memory_format=torch.contiguous_format)
    if y0.numel() == 0:
        return out
    base, h, t = y0.flatten(0, -2), h.flatten(0, -2), blocks(h.dtype, B.dtype)
    n_rows, n_cols = base.shape
    with on_device_of(y0):
        wrap_triton(_epilogue_kernel)[tiles(n_rows, n_cols, t)](
            base,
            h,
            B,
            g,
            scale,
            g if b is None else b,
            out,
            n_rows,
            n_cols,
            h.shape[1],
            *base.stride(),
            *h.stride(),
            *B.stride(),
            g.stride(0),
            0 if b is None else b.stride(0),
            HAS_BIAS=b is not None,
            **t._asdict(),
        )
    return out


def reference_dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Return the norms of the rows of W + scale * B A, (out,), in float32 (float64 for float64)."""
    high = torch.promote_types(W.dtype, torch.float32)
    turned = W.to(high) + scale.to(high) * (B.to(high) @ A.to(high))
    return turned.square().sum(1).sqrt()


def reference_dora_epilogue(
    y0: Tensor, h: Tensor, B: Tensor, g: Tensor, scale: Tensor, b: Tensor | None = None
) -> Tensor:
    """Return g * (y0 + scale * h B^T) + b, in float32 (float64 for float64), rounded once to the dtype of y0."""
    high = torch.promote_types(y0.dtype, torch.float32)
    y = g.to(high) * (y0.to(high) + scale.to(high) * (h.to(high) @ B.to(high).T))
    return (y if b is None else y + b.to(high)).to(y0.dtype)


@triton_op("adaptc::dora_norm", mutates_args=())
def _norm_op(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    if runs_kernels(W):
        return _launch_squares(W, A, B, scale).sum(0).sqrt()
    return reference_dora_norm(W, A, B, scale)


@_norm_op.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return W.new_empty(W.shape[0], dtype=torch.promote_types(W.dtype, torch.float32))


def _mark_constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradients(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return None, None, None, None


_norm_op.register_autograd(_no_gradients, setup_context=_mark_constant)
decompose_in_transforms("dora_norm", lambda *tensors: reference_dora_norm(*tensors).detach())


# No default for the bias: torch does not pass arguments at their defaults to the setup of the gradient.
@triton_op("adaptc::dora_epilogue", mutates_args=())
def _epilogue_op(y0: Tensor, h: Tensor, B: Tensor, g: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    if runs_kernels(y0):
        return _launch_epilogue(y0, h, B, g, scale, b)
    return reference_dora_epilogue(y0, h, B, g, scale, b)


@_epilogue_op.register_fake
def _(y0: Tensor, h: Tensor, B: Tensor, g: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    return torch.empty_like(y0, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y0, h, B, g, scale, b = inputs
    # y0 is the largest tensor, and only the gradient of the gain needs it.
    ctx.save_for_backward(y0 if ctx.needs_input_grad[3] else None, h, B, g, scale)
    ctx.bias_dtype = None if b is None else b.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y0, h, B, g, scale = ctx.saved_tensors
    needs_y0, needs_h, needs_B, needs_g, needs_scale, needs_b = ctx.needs_input_grad
    d_y0 = d_h = d_B = d_g = d_scale = d_b = None
    # Matmuls in the dtype that a plain matmul of these tensors would have, all else in float32.
    matmul_dtype = torch.promote_types(dy.dtype, torch.promote_types(h.dtype, B.dtype))
    sum_dtype = torch.promote_types(dy.dtype, torch.float32)
    gain, s, dy_in_sum_dtype = g.to(sum_dtype), scale.to(sum_dtype), dy.to(sum_dtype)
    if needs_y0:
        d_y0 = (dy_in_sum_dtype * gain).to(dy.dtype)
    if needs_h:
        d_h = ((dy_in_sum_dtype * (gain * s)).to(matmul_dtype) @ B.to(matmul_dtype)).to(h.dtype)
    if needs_B or needs_g or needs_scale:
        # dy^T h serves all three, so that h B^T is not made again.
        crossed = (dy.flatten(0, -2).T.to(matmul_dtype) @ h.flatten(0, -2).to(matmul_dtype)).to(sum_dtype)
        d_B = (crossed * (gain * s)[:, None]).to(B.dtype)
        along = (crossed * B.to(sum_dtype)).sum(1)
        d_scale = (gain * along).sum().to(scale.dtype)
        if needs_g:
            d_g = ((dy_in_sum_dtype * y0.to(sum_dtype)).flatten(0, -2).sum(0) + s * along).to(g.dtype)
    if needs_b:
        d_b = dy_in_sum_dtype.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return d_y0, d_h, d_B, d_g, d_scale, d_b


_epilogue_op.register_autograd(_backward, setup_context=_save)
decompose_in_transforms("dora_epilogue", reference_dora_epilogue)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norms of the rows of W + scale * B A: (out,), float32 (float64 for float64), a constant to autograd.

    Raises BackendError for shapes, dtypes or devices it is not defined for.
    """
    check_factors("dora_norm", W, A, B)
    return _norm_op(W, A, B, scale_tensor(scale, W))


def dora_epilogue(
    y0: Tensor, h: Tensor, B: Tensor, g: Tensor, scale: float | Tensor, b: Tensor | None = None
) -> Tensor:
    """Return g * (y0 + scale * h B^T) + b: (..., out), contiguous, of the dtype of y0.

    Raises BackendError for shapes, dtypes or devices it is not defined for.
    """
    op = "dora_epilogue"
    check(op, y0.ndim >= 2, "y0 of shape (..., out)", tuple(y0.shape))
    check(op, B.ndim == 2 and B.shape[0] == y0.shape[-1], f"B of shape ({y0.shape[-1]}, r)", tuple(B.shape))
    down = (*y0.shape[:-1], B.shape[1])
    check(op, tuple(h.shape) == down, f"h of shape {down}", tuple(h.shape))
    for name, t in [("g", g)] if b is None else [("g", g), ("b", b)]:
        check(op, tuple(t.shape) == (y0.shape[-1],), f"{name} of shape ({y0.shape[-1]},)", tuple(t.shape))
    check_floats(op, y0=y0, h=h, B=B, g=g, **({} if b is None else {"b": b}))
    return _epilogue_op(y0, h, B, g, scale_tensor(scale, y0), b)


def _aot_squares(weight: str, factor: str) -> AotKernel:
    pointers = {"w_ptr": weight, "a_ptr": factor, "b_ptr": factor, "scale_ptr": "fp32", "sums_ptr": "fp32"}
    return aot_tile_record(
        _squares_kernel, f"squares-{weight}-{factor}", pointers, ("w_col", "a_col", "b_rank"), factor
    )


def _aot_epilogue(base: str, factor: str, bias: bool) -> AotKernel:
    pointers = {"h_ptr": factor, "b_ptr": factor, "gain_ptr": "fp32", "scale_ptr": "fp32"}
    pointers |= dict.fromkeys(("base_ptr", "bias_ptr", "out_ptr"), base)
    name = f"epilogue{'_bias' if bias else ''}-{base}-{factor}"
    ones = ("base_col", "h_rank", "b_rank", "gain_col", "bias_col")
    return aot_tile_record(_epilogue_kernel, name, pointers, ones, factor, HAS_BIAS=bias)


AOT_KERNELS = [_aot_squares(*types) for types in AOT_DTYPES] + [
    _aot_epilogue(*types, bias=True) for types in AOT_DTYPES
]
AOT_KERNELS += [_aot_epilogue("bf16", "bf16", bias=False)]
