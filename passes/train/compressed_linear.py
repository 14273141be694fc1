"""Compute a linear layer whose weight has a gradient of compressed inputs: ``adaptc::compressed_linear``.

    compressed_linear(x, weight, direction, scale, training)   x (..., in), weight (out, in) -> x W^T (..., out)

The features of x, filled up with zeros, form groups of the size of ``direction`` (n,), which has no gradient. In
training each group g is kept for the backward as the number g . direction, and the gradient of the weight is that of
the input whose groups are ``scale`` times these numbers times ``direction``. In inference it is the true gradient. The
gradient of x is exact in both. ``training`` is a mode flag, which ``train()`` and ``eval()`` of modules switch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.op_rules import decompose_in_transforms
from adaptc.passes.graph.train_eval import ModeFlag, add_mode_flag
from adaptc.torch_typing import custom_op

#: the op's name; a program that trains may have it, in files too, and it needs no GPU
COMPRESSED_LINEAR = "compressed_linear"


@custom_op(f"adaptc::{COMPRESSED_LINEAR}", mutates_args=())
def compressed_linear(x: Tensor, weight: Tensor, direction: Tensor, scale: float, training: bool) -> Tensor:
    return F.linear(x, weight)


@compressed_linear.register_fake
def _(x: Tensor, weight: Tensor, direction: Tensor, scale: float, training: bool) -> Tensor:
    return F.linear(x, weight)


def group_features(t: Tensor, size: int) -> Tensor:
    """Return the features ``t`` (..., in) as groups (..., groups, size), filled up with zeros."""
    width = t.shape[-1]
    groups = -(-width // size)
    padded: Tensor = F.pad(t, (0, groups * size - width))
    return padded.reshape(*t.shape[:-1], groups, size)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, direction, ctx.scale, ctx.training = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    kept = None
    if need_weight:
        kept = group_features(x.detach(), direction.shape[0]) @ direction if ctx.training else x
    ctx.width = x.shape[-1]
    ctx.save_for_backward(kept, weight if need_x else None, direction if ctx.training else None)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, direction = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    of_weight = None
    if need_weight:
        of_weight = g.reshape(-1, g.shape[-1]).t() @ kept.reshape(-1, kept.shape[-1])
        if ctx.training:  # it is that of the sums over groups, (out, groups)
            of_weight = (of_weight.unsqueeze(-1) * (ctx.scale * direction)).flatten(-2)[:, : ctx.width]
    return g @ weight if need_x else None, of_weight, None, None, None


compressed_linear.register_autograd(_backward, setup_context=_save)


def _by_plain_operators(x: Tensor, weight: Tensor, direction: Tensor, scale: float, training: bool) -> Tensor:
    if not training:
        return F.linear(x, weight)
    direction, size = direction.detach(), direction.shape[0]
    kept = group_features(x.detach(), size) @ direction
    by_groups = scale * F.linear(kept, group_features(weight, size) @ direction)
    return F.linear(x, weight.detach()) + (by_groups - by_groups.detach())


decompose_in_transforms(COMPRESSED_LINEAR, _by_plain_operators)
add_mode_flag(torch.ops.adaptc.compressed_linear.default, ModeFlag(4))
