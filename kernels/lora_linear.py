"""Compute a linear layer with LoRA as one op (Hu et al., arXiv 2106.09685).

    lora_linear(x, W, bias, A, B, scale)    y = x W^T + bias + scale * (x A^T) B^T

x (..., K), W (N, K), A (R, K), B (N, R), of any strides; bias (N,) or None; scale a number or a 0-d tensor, read on the
device. x, W and bias have one dtype: float32, bfloat16 or float16. A and B have one dtype, which may be another: PEFT
keeps adapters in float32 over a base in half precision. Other devices than a GPU take float64 too. y has W's dtype.

The arithmetic and the kernels are those of :mod:`adaptc.kernels.packed_lora`, which is for inference: here the factors
are packed in each call, and may have gradients.

The backward computes h again instead of keeping it. R is small, so that takes R / N of the time of the layer's own
matmul. Autograd would keep a tensor for every layer and token. W gets a gradient only if it asks for one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.kernels._launch import check, check_floats, is_empty_grid, on_device_of, runs_kernels, scale_tensor
from adaptc.kernels._packed_products import FEW_ROWS, PackedLayout, launch_few_rows, launch_many_rows
from adaptc.kernels.lora_epilogue import (
    check_scale,
    lora_down,
    lora_up_add,
    matmul_transposed,
    reference_lora_down,
)
from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_typing import triton_op


def _launch(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    n_rows, n_cols = x.shape[0], W.shape[0]
    if is_empty_grid(n_rows) or is_empty_grid(n_cols):
        return x.new_empty((n_rows, n_cols))
    down, up = A.contiguous(), B.t().reshape(-1).contiguous()
    layout = PackedLayout(W, bias, down, [n_cols])
    bias = None if bias is None else bias.contiguous()
    # A symbolic number of rows takes the path for any number: a guard here would compile anew for a longer prompt.
    few = statically_known_true(n_rows <= FEW_ROWS) and W.is_contiguous()
    launch = launch_few_rows if few else launch_many_rows
    with on_device_of(x):
        return launch(layout, x.contiguous(), W, bias, down, up, None, scale)


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
