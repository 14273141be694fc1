"""Products with frozen weights of the base in a training step: forward, and the gradient of what was multiplied.

Before: a step that was told, per weight, what its products are to be computed by (:data:`Told`). After: what
``F.linear`` and its backward compute, up to rounding. A product of a type that nothing was told of is torch's own, and
so is every one while a graph is exported, which has to stay plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.ir.product import add_product, product, product_op
from adaptc.passes.train.autocast import autocast_dtype, cast, without_autocast
from adaptc.passes.train.first_order import plain_only

#: of one type of numbers: kind and classes of rows of the product, and of the gradient of its input
Kinds = tuple[torch.dtype, str, Sequence[int], str, Sequence[int]]
#: of one weight; nothing for torch's own. Tuples, since code of graphs writes them out.
Told = Sequence[Kinds]


def base_product(x: Tensor, w: Tensor, b: Tensor | None, told: Told) -> Tensor:
    """x w^T + b: x (..., K), w (N, K), b (N,) or None. No gradient is recorded."""
    for dtype, kind, classes, _, _ in told:
        if dtype == x.dtype and not torch.compiler.is_exporting():
            # A compiler cannot look into the choice, and takes the op as it is.
            return (product_op if torch.compiler.is_compiling() else product)(x, w, b, kind, classes, [])
    return F.linear(x, w, b)


def base_gradient(g: Tensor, w: Tensor, told: Told, total: Tensor | None = None) -> Tensor:
    """g w, added to ``total`` where there is one, which may be written to: g (rows, N), w (N, K), total (rows, K)."""
    for dtype, _, _, kind, classes in told:
        if dtype == g.dtype and not torch.compiler.is_exporting():
            if total is not None and not torch.compiler.is_compiling():
                return add_product(total, g, w.t(), kind, classes)
            made = base_product(g, w.t(), None, ((dtype, kind, classes, kind, classes),))
            return made if total is None else total + made
    return g @ w if total is None else total.addmm_(g, w)


def frozen_linear(x: Tensor, w: Tensor, b: Tensor | None, told: Told) -> Tensor:
    """``F.linear`` of a layer that is not trained, differentiable in x as often as one likes; where the layer trains
    after all, in transforms of ``torch.func`` and in forward mode, torch's own."""
    if w.requires_grad or (b is not None and b.requires_grad) or torch.compiler.is_exporting() or plain_only(x, w, b):
        return F.linear(x, w, b)
    dtype = autocast_dtype(x)
    x, w, b = cast(x, dtype), cast(w, dtype), cast(b, dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return base_product(x, w, b, told)
    return _Frozen.apply(x, w, b, told)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, told: Told) -> Tensor:
        return base_product(x, w, b, told)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w, _, ctx.told = inputs
        ctx.save_for_backward(w)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        if g.requires_grad and torch.is_grad_enabled():
            return g @ w, None, None, None
        d_x = base_gradient(g.reshape(-1, g.shape[-1]), w, ctx.told)
        return d_x.reshape(*g.shape[:-1], w.shape[1]), None, None, None
