"""A layer whose outputs go into a cross entropy, as one step of a training graph.

Before: the graph of a module to train. After: for logits = linear(x, W, b) and loss = cross_entropy(logits, labels) one
call that gives both, equal up to the order of sums, and so are the gradients. A vocabulary makes the logits the largest
tensor of a step, and autograd has four of them: logits, their log softmax, and the gradients of both. Here the
logits are kept, since the module returns them; the rest is made again in the backward, some columns at a time, each
multiplied with its rows of W before the next are made.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaptc.passes.ir.effects import sweep, touched
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.pass_infra import GraphPass, PassResult

aten = torch.ops.aten

#: numbers that a piece of the gradient of the logits may have: some megabytes, which caches hold
PIECE = 2**21
#: and columns it has at least
LEAST = 256
MEAN, SUM = 1, 2


@dataclass(frozen=True)
class TrainLoss(GraphPass):
    """The count is that of the losses."""

    name: ClassVar[str] = "train_loss"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = touched(subject)
        count = 0
        for node in subject.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            found = _match(node)
            if found is None:
                continue
            logits, linear = found
            reduction, ignored = argument(node, 3), argument(node, 4)
            x, w, b = (argument(linear, i) for i in range(3))
            # The layer is computed where the loss stands: nothing it reads may be written to in between.
            if not dirty.isdisjoint((logits, linear, x, w, b)):
                continue
            with subject.inserting_before(node):
                labels, dtype = node.args[1], logits.meta["val"].dtype
                made = subject.call_function(loss_of_layer, (x, w, b, labels, dtype, reduction == MEAN, ignored))
                new = [subject.call_function(operator.getitem, (made, i)) for i in range(2)]
            for old, piece in zip((logits, node), new, strict=True):
                piece.meta = dict(old.meta)
                # What reads the logits before the loss is made keeps its own.
                old.replace_all_uses_with(piece, delete_user_cb=lambda user: user > made)  # noqa: B023
            count += 1
        sweep(subject)
        return PassResult(subject, count)


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(logits, the layer they come from) of a loss that is defined here."""
    flat, labels, weight, reduction, _, smoothing = (argument(node, i) for i in range(6))
    value = labels.meta["val"]
    if weight is not None or reduction not in (MEAN, SUM) or smoothing != 0.0 or value.ndim != 1:
        return None
    if value.dtype != torch.int64:
        return None
    logits = flat.args[0] if flat.target in (aten.view.default, aten.reshape.default) else flat
    if not isinstance(logits, fx.Node) or flat.meta["val"].shape[-1] != logits.meta["val"].shape[-1]:
        return None
    layer = logits.args[0] if logits.target is aten.to.dtype else logits
    return (logits, layer) if isinstance(layer, fx.Node) and layer.target is aten.linear.default else None


def loss_of_layer(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, dtype: torch.dtype, mean: bool, ignored: int
) -> tuple[Tensor, Tensor]:
    """(logits (..., V) in ``dtype``, their cross entropy): x (..., K), w (V, K), b (V,), labels (rows of x,) int64.

    The mean or the sum over the rows whose label is not ``ignored``. Gradients for x, w and b, once. Where autocast is
    on, both are computed as they were written.
    """
    if torch.is_autocast_enabled(x.device.type):
        logits = F.linear(x, w, b)
        logits = logits if w.dtype == dtype else logits.to(dtype)
        flat, reduction = logits.reshape(-1, logits.shape[-1]), "mean" if mean else "sum"
        return logits, F.cross_entropy(flat, labels, ignore_index=ignored, reduction=reduction)
    return _Loss.apply(x, w, b, labels, dtype, mean, ignored)[:2]


class _Loss(torch.autograd.Function):
    """The results are the logits, the loss and, to be kept, the log of the sum of exponentials of each row."""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, dtype: torch.dtype, mean: bool, ignored: int
    ) -> tuple[Tensor, ...]:
        logits = F.linear(x, w, b).to(dtype)
        flat = logits.reshape(-1, logits.shape[-1])
        top = flat.amax(-1)
        total = torch.zeros_like(top)
        for part in _pieces(flat):
            total += (flat[:, part] - top[:, None]).exp_().sum(-1)
        lse = top + total.log()
        kept = labels != ignored
        picked = flat.gather(1, labels.where(kept, 0)[:, None])[:, 0]
        loss = (lse - picked).where(kept, 0).sum()
        return logits, loss / kept.sum() if mean else loss, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, _, labels, _, ctx.mean, ctx.ignored = inputs
        logits, _, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w, labels, logits, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logits: Tensor | None, g_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, w, labels, logits, lse = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        d_b = w.new_empty(w.shape[0]) if ctx.needs_input_grad[2] else None
        d_x = w.new_zeros(flat.shape[0], w.shape[1]) if ctx.needs_input_grad[0] else None
        kept = labels != ctx.ignored
        weight = torch.zeros_like(lse)
        if g_loss is not None:
            weight = (g_loss / kept.sum() if ctx.mean else g_loss.expand(len(lse))).where(kept, 0)
        given = None if g_logits is None else g_logits.reshape(flat.shape)
        for part in _pieces(flat):
            piece = (flat[:, part] - lse[:, None]).exp_()
            # A sum, and no choice of rows, for which a GPU would have to be waited for.
            here = (labels >= part.start) & (labels < part.stop)
            at = (labels - part.start).clamp(0, piece.shape[1] - 1)
            piece.scatter_add_(1, at[:, None], -here.to(piece.dtype)[:, None])
            piece *= weight[:, None]
            if given is not None:
                piece += given[:, part]
            piece = piece.to(w.dtype)
            if d_x is not None:
                d_x.addmm_(piece, w[part])
            if d_w is not None:
                d_w[part] = piece.t() @ x.reshape(-1, x.shape[-1])
            if d_b is not None:
                d_b[part] = piece.sum(0)
        d_x = None if d_x is None else d_x.reshape(ctx.shape)
        return d_x, d_w, d_b, None, None, None, None


def _pieces(flat: Tensor) -> Iterator[slice]:
    """The columns of the logits, some at a time."""
    width = max(LEAST, PIECE // max(len(flat), 1))
    for start in range(0, flat.shape[1], width):
        yield slice(start, min(start + width, flat.shape[1]))
