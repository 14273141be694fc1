"""Compute a linear layer with LoRA as one op (Hu et al., arXiv 2106.09685).

    lora_linear(x, W, bias, A, B, scale)    y = x W^T + bias + scale * (x A^T) B^T

x (..., K), W (N, K), A (R, K), B (N, R), of any strides; bias (N,) or None; scale a number or a 0-d tensor, read on the
device. x, W and bias have one dtype: float32, bfloat16 or float16. A and B have one dtype, which may be another: PEFT
keeps adapters in float32 over a base in half precision. Other devices than a GPU take float64 too. y has W's dtype.

For the adapter x is cast to A's dtype, and h = x A^T is rounded to it, as in the eager layers. Everything else is
float32 until y is rounded, and exact for matmuls of float32 (no TF32). No atomics: the same inputs give the same bits.

Up to 16 rows (decoding) one kernel does it all. Each program owns a block of columns of y and goes over K once, with
one tile of x for both x W^T and h. W is read once, which takes nearly all the time. A launch for h, or reading y back
to add to it, would take long in comparison. The price is that every program computes all of h for itself. For that, a
program reads R K elements of A, which is R / BLOCK_N of its reads of W. After the first program they come from the L2
cache. It multiplies as many more numbers.

For more rows cuBLAS is faster at x W^T, and the price would be paid again for every 16 rows. They take cuBLAS, a down
projection, and an up projection that adds in place (:mod:`adaptc.kernels.lora_epilogue`). There the base's matmul is
rounded to W's dtype before the sum is.

The backward computes h again instead of keeping it. R is small, so that takes R / N of the time of the layer's own
matmul. Autograd would keep a tensor for every layer and token. W gets a gradient only if it asks for one.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op
from torch.nn import functional as F

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import check, check_floats, on_device_of, runs_kernels, scale_tensor, wrap_triton
from adaptc.kernels._low_rank_tile import AOT_DTYPES, TORCH_DTYPES
from adaptc.kernels.lora_epilogue import (
    check_scale,
    dot_in_right_dtype,
    is_empty_grid,
    launch_down,
    launch_up_add,
    lora_down,
    lora_up_add,
    matmul_transposed,
    reference_lora_down,
)
from adaptc.op_rules import decompose_in_transforms

#: the number of rows up to which one kernel does it all: the fewest that matrix instructions take
FEW_ROWS = 16

#: pipeline stages: more than triton's default, since most of the time goes to waiting for W
STAGES = 4


@triton.jit
def _few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, scale_ptr, y_ptr, n_rows, n_cols, K, rank,
    x_row, x_col, w_row, w_col, bias_col, a_rank, a_col, b_row, b_rank,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < n_rows)[:, None]
    col_ok = (cols < n_cols)[None, :]
    x_rows = x_ptr + rows[:, None] * x_row
    b_cols = b_ptr + cols[None, :] * b_row
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    rank_ok = r < rank
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        k_ok = (k < K)[:, None]
        x = tl.load(x_rows + k[None, :] * x_col, mask=row_ok & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + cols[None, :] * w_row + k[:, None] * w_col, mask=k_ok & col_ok, other=0.0)
        a = tl.load(a_ptr + r[None, :] * a_rank + k[:, None] * a_col, mask=k_ok & rank_ok[None, :], other=0.0)
        base = dot_in_right_dtype(x, w, base)
        h = dot_in_right_dtype(x, a, h)
    b = tl.load(b_cols + r[:, None] * b_rank, mask=rank_ok[:, None] & col_ok, other=0.0)
    update = dot_in_right_dtype(h, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    # Ranks above BLOCK_R read x and A again, but not W.
    for above in range(BLOCK_R, rank, BLOCK_R):
        r = (above + tl.arange(0, BLOCK_R)).to(tl.int64)
        rank_ok = r < rank
        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            k_ok = (k < K)[:, None]
            x = tl.load(x_rows + k[None, :] * x_col, mask=row_ok & (k < K)[None, :], other=0.0)
            a = tl.load(a_ptr + r[None, :] * a_rank + k[:, None] * a_col, mask=k_ok & rank_ok[None, :], other=0.0)
            h = dot_in_right_dtype(x, a, h)
        b = tl.load(b_cols + r[:, None] * b_rank, mask=rank_ok[:, None] & col_ok, other=0.0)
        update = dot_in_right_dtype(h, b, update)
    y = base + tl.load(scale_ptr).to(tl.float32) * update
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols * bias_col, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=row_ok & col_ok)


def few_rows_blocks(base: torch.dtype, adapter: torch.dtype, n_cols: Any, rank: Any) -> tuple[dict[str, int], int]:
    """Return blocks and the number of warps for few rows.

    A symbolic rank gets the smallest blocks: it must not become a constant of compiled code.
    """
    # Exact float32 products are not made by tensor cores and hold their operands in registers: small tiles.
    if torch.float32 in (base, adapter):
        return {"BLOCK_M": FEW_ROWS, "BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_R": 16}, 4
    # Narrow enough for two programs on each multiprocessor, and no narrower, since each computes h.
    t = {"BLOCK_M": FEW_ROWS, "BLOCK_N": 16 if isinstance(n_cols, int) and n_cols <= 4096 else 32}
    # The largest tiles whose registers do not spill where no stride is known to be a multiple of 16.
    if not isinstance(rank, int) or rank <= 16:
        return t | {"BLOCK_K": 128, "BLOCK_R": 16}, 4
    return t | ({"BLOCK_K": 128, "BLOCK_R": 32} if rank <= 32 else {"BLOCK_K": 64, "BLOCK_R": 64}), 8


def _launch_few_rows(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    (n_rows, K), n_cols, rank = x.shape, W.shape[0], A.shape[0]
    t, warps = few_rows_blocks(W.dtype, A.dtype, n_cols, rank)
    y = x.new_empty((n_rows, n_cols))
    if not is_empty_grid(n_rows, n_cols):
        with on_device_of(x):
            wrap_triton(_few_rows_kernel)[(triton.cdiv(n_cols, t["BLOCK_N"]),)](
                x, W, W if bias is None else bias, A, B, scale, y, n_rows, n_cols, K, rank,
                *x.stride(), *W.stride(), 1 if bias is None else bias.stride(0), *A.stride(), *B.stride(),
                HAS_BIAS=bias is not None, **t, num_warps=warps, num_stages=STAGES,
            )  # fmt: skip
    return y


def _launch(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    # A symbolic number of rows takes the path for any number: a guard here would compile anew for a longer prompt.
    if statically_known_true(x.shape[0] <= FEW_ROWS):
        return _launch_few_rows(x, W, bias, A, B, scale)
    y = F.linear(x, W, bias)
    return launch_up_add(y, launch_down(x, A, None), B, scale, out=y)


@triton_op("adaptc::lora_linear", mutates_args=())
def _lora_linear_op(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    _check(x, W, bias, A, B, scale)
    run = _launch if runs_kernels(x) else reference_lora_linear
    return run(x, W, bias, A, B, scale)


@_lora_linear_op.register_fake
def _(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    _check(x, W, bias, A, B, scale)
    return x.new_empty((x.shape[0], W.shape[0]))


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return x W^T + bias + scale * (x A^T) B^T: x (..., K), W (N, K), bias (N,), A (R, K), B (N, R) -> (..., N).

    All tensors but the scale have gradients. Raises BackendError for shapes, dtypes or devices it is not defined for.
    """
    check("lora_linear", x.ndim > 0, "x of shape (..., K)", tuple(x.shape))
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    y = _lora_linear_op(rows, W, bias, A, B, scale_tensor(scale, x))
    return y.reshape(*x.shape[:-1], W.shape[0])


def _check(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> None:
    op = "lora_linear"
    check(op, x.ndim == 2, "x of shape (M, K)", tuple(x.shape))
    check(op, W.ndim == 2 and W.shape[1] == x.shape[1], f"W of shape (N, {x.shape[1]})", tuple(W.shape))
    check(op, A.ndim == 2 and A.shape[1] == x.shape[1], f"A of shape (R, {x.shape[1]})", tuple(A.shape))
    up = W.shape[0], A.shape[0]
    check(op, tuple(B.shape) == up, f"B of shape {up}", tuple(B.shape))
    check(op, W.dtype == x.dtype, f"W of x's type {x.dtype} (cast one of them)", W.dtype)
    check(op, A.dtype == B.dtype, f"B of A's type {A.dtype} (cast one of them)", B.dtype)
    check_floats(op, x=x, W=W, A=A, B=B)
    if bias is not None:
        check(op, tuple(bias.shape) == up[:1], f"a bias of shape {up[:1]}", tuple(bias.shape))
        check(op, bias.dtype == W.dtype, f"a bias of W's type {W.dtype} (cast it)", bias.dtype)
        check_floats(op, x=x, bias=bias)
    check_scale(op, scale, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W, _, A, B, scale = inputs
    ctx.save_for_backward(x, W, A, B, scale)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, W, A, B, scale = ctx.saved_tensors
    need_x, need_W, need_bias, need_A, need_B, _ = ctx.needs_input_grad
    gx = gA = gB = None
    if need_x or need_A:
        # Without the scale, which then enters the float32 sums of both gradients.
        through = lora_down(g, B.t())
        gx = lora_up_add(g @ W, through, A.t(), scale) if need_x else None
        gA = lora_down(x.t(), through.t(), scale).t() if need_A else None
    if need_B:
        gB = lora_down(g.t(), lora_down(x, A).t(), scale)
    return gx, g.t() @ x if need_W else None, g.sum(0) if need_bias else None, gA, gB, None


_lora_linear_op.register_autograd(_backward, setup_context=_save)


def reference_lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = matmul_transposed(x, W) + scale * matmul_transposed(reference_lora_down(x, A), B)
    return (y if bias is None else y + bias).to(W.dtype)


decompose_in_transforms("lora_linear", reference_lora_linear, nondifferentiable=(5,))


def _aot_few_rows(base: str, adapter: str, n_cols: int, rank: int) -> AotKernel:
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), base)
    pointers |= dict.fromkeys(("a_ptr", "b_ptr"), adapter) | {"scale_ptr": "fp32"}
    t, warps = few_rows_blocks(TORCH_DTYPES[base], TORCH_DTYPES[adapter], n_cols, rank)
    name = f"lora_linear-{base}-{adapter}-{n_cols}-rank{rank}"
    ones = ("x_col", "w_col", "bias_col", "a_col", "b_rank")
    a = AotKernel.from_pointers(_few_rows_kernel, name, pointers, ones, base != "fp32", HAS_BIAS=True, **t)
    return replace(a, num_warps=warps, num_stages=STAGES)


AOT_KERNELS = [
    *(_aot_few_rows(*types, 4096, 16) for types in AOT_DTYPES),
    *(
        _aot_few_rows("bf16", "bf16", n_cols, rank)
        for n_cols, rank in ((4096, 64), (14336, 16), (14336, 32), (14336, 64))
    ),
]
