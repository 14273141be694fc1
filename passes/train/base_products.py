"""Compute matmuls with frozen base weights in a training step: the forward, and the gradient of the input.

A step is told, per weight, which kind of matmul to use (:data:`MatmulKinds`). Results are those of ``F.linear`` and its
backward, up to rounding. A dtype that :data:`MatmulKinds` does not name uses torch's own matmul. So does every dtype
during export, since an exported graph must have plain ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.protocol.matmul_op import add_linear_matmul, linear_matmul, linear_matmul_op
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.train.autocast import cast, without_autocast
from adaptc.passes.train.first_order import needs_plain_ops
from adaptc.torch_modes import autocast_dtype

#: for one dtype: kind of matmul and classes of row counts it is for, then both for the gradient of the input
DtypeKinds = tuple[torch.dtype, str, Sequence[int], str, Sequence[int]]
#: the kinds of matmul for one weight; empty for torch's own. Tuples, since the code of a graph prints them.
MatmulKinds = Sequence[DtypeKinds]


def base_matmul(x: Tensor, w: Tensor, b: Tensor | None, kinds: MatmulKinds) -> Tensor:
    """Return x w^T + b: x (..., K), w (N, K), b (N,) or None. Its callers have backwards of their own."""
    for dtype, kind, classes, _, _ in kinds:
        if dtype == x.dtype and not torch.compiler.is_exporting():
            # A compiler cannot trace how product() chooses, so it gets an op that it does not look into.
            return (linear_matmul_op if torch.compiler.is_compiling() else linear_matmul)(x, w, b, kind, classes, [])
    if isinstance(w, QuantizedTensor) and not torch.compiler.is_exporting():
        return w.linear_of_values(x, b)
    return F.linear(x, w, b)


def base_input_gradient(g: Tensor, w: Tensor, kinds: MatmulKinds, total: Tensor | None = None) -> Tensor:
    """Return g w, plus ``total`` where it is given: g (rows, N), w (N, K), total (rows, K).

    ``total`` may be written to.
    """
    for dtype, _, _, kind, classes in kinds:
        if dtype == g.dtype and not torch.compiler.is_exporting():
            if total is not None and not torch.compiler.is_compiling():
                return add_linear_matmul(total, g, w.t(), kind, classes)
            made = base_matmul(g, w.t(), None, ((dtype, kind, classes, kind, classes),))
            return made if total is None else total + made
    return g @ w if total is None else total.addmm_(g, w)


def frozen_linear(x: Tensor, w: Tensor, b: Tensor | None, kinds: MatmulKinds) -> Tensor:
    """Return ``F.linear`` of a frozen layer, differentiable in x any number of times.

    Torch's own ``F.linear`` runs where the layer is trained after all, in transforms of ``torch.func``, in forward mode
    and during export.
    """
    if (
        w.requires_grad
        or (b is not None and b.requires_grad)
        or torch.compiler.is_exporting()
        or needs_plain_ops(x, w, b)
    ):
        return F.linear(x, w, b)
    dtype = autocast_dtype(x)
    x, w, b = cast(x, dtype), cast(w, dtype), cast(b, dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return base_matmul(x, w, b, kinds)
    step: Any = _FrozenLinear  # torch gives apply no types
    return step.apply(x, w, b, kinds)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, kinds: MatmulKinds) -> Tensor:
        return base_matmul(x, w, b, kinds)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w, _, ctx.kinds = inputs
        ctx.save_for_backward(w)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        if g.requires_grad and torch.is_grad_enabled():
            return g @ w, None, None, None
        d_x = base_input_gradient(g.reshape(-1, g.shape[-1]), w, ctx.kinds)
        return d_x.reshape(*g.shape[:-1], w.shape[1]), None, None, None
