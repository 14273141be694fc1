"""A layer whose outputs go into a cross entropy, as one step of a training graph.

Before: the graph of a module to train. After: for logits = linear(x, W, b) and loss = cross_entropy(logits, labels) one
call that gives both, equal up to the order of sums, and so are the gradients. A vocabulary makes the logits the largest
tensor of a step, and autograd has four of them: logits, their log softmax, and the gradients of both. Here the
logits are kept, since the module returns them; the rest is made again in the backward, some columns at a time, each
multiplied with its rows of W before the next are made.

A row without a label adds nothing to the loss. With ``labelled`` such rows are left out of the product, too: the loss
and its gradients are equal, the logits that are returned are zero there. Otherwise the backward alone leaves them out.
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
from adaptc.passes.train.autocast import autocast_dtype, cast, without_autocast

aten = torch.ops.aten

#: numbers that a piece of the gradient of the logits may have: some megabytes, which caches hold
PIECE = 2**21
#: and columns it has at least
LEAST = 256
MEAN, SUM = 1, 2
#: types of labels that say which column is right
INDICES = (torch.int64, torch.uint8)


@dataclass(frozen=True)
class TrainLoss(GraphPass):
    """The count is that of the losses. ``labelled``: only those whose logits nothing else reads but the caller."""

    name: ClassVar[str] = "train_loss"

    labelled: bool = False

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
            if self.labelled and not _returned_alone(node, logits, linear):
                continue
            # A cast that is not all that reads the layer is made of the loss's copy alone.
            cast_to = logits.args[1] if logits is not linear else None
            given = logits if set(linear.users) == {logits} else linear
            returned = cast_to if given is logits else None
            with subject.inserting_before(node):
                options = (returned, cast_to, reduction == MEAN, ignored, self.labelled)
                made = subject.call_function(loss_of_layer, (x, w, b, node.args[1], *options))
                new = [subject.call_function(operator.getitem, (made, i)) for i in range(2)]
            for old, piece in zip((given, node), new, strict=True):
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
    if value.dtype not in INDICES:
        return None
    logits = _unviewed(flat)
    if not isinstance(logits, fx.Node) or flat.meta["val"].shape[-1] != logits.meta["val"].shape[-1]:
        return None
    if logits.target is not aten.to.dtype:
        return (logits, logits) if logits.target is aten.linear.default else None
    layer = logits.args[0]
    if not isinstance(layer, fx.Node) or layer.target is not aten.linear.default:
        return None
    low, high = layer.meta["val"].dtype, logits.meta["val"].dtype
    return (logits, layer) if torch.promote_types(low, high) == high else None


def _unviewed(flat: fx.Node) -> Any:
    return flat.args[0] if flat.target in (aten.view.default, aten.reshape.default) else flat


def _returned_alone(node: fx.Node, logits: fx.Node, linear: fx.Node) -> bool:
    """Whether nothing but this loss, and the caller, reads the logits: zeros would change it."""
    chain = {node, node.args[0], logits, linear}
    others = {user for n in chain - {node} for user in n.users} - chain
    return all(user.op == "output" for user in others)


def loss_of_layer(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    returned: torch.dtype | None,
    high: torch.dtype | None,
    mean: bool,
    ignored: int,
    labelled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logits (..., V), their cross entropy): x (..., K), w (V, K), b (V,), labels (rows of x,) int64 or uint8.

    The mean or the sum over the rows whose label is not ``ignored``. ``returned``: type of the logits, None for that of
    the product; ``high``: what they are cast to for the loss, None for their own. ``labelled``: logits of other rows are
    zero, and take no work. Gradients for x, w and b, once. Under autocast the product is in its type, the loss float32.
    """
    if labels.dtype not in INDICES:
        logits = F.linear(x, w, b)
        flat = cast(logits, high).reshape(-1, w.shape[0])
        # Which says what is wrong with these labels.
        reduction = "mean" if mean else "sum"
        return cast(logits, returned), F.cross_entropy(flat, labels, ignore_index=ignored, reduction=reduction)
    dtype = autocast_dtype(x)
    labels = labels.long()
    return _Loss.apply(x, w, b, labels, dtype, returned, high, mean, ignored, labelled)


class _Loss(torch.autograd.Function):
    """Kept are the logits, which are returned, and the log of the sum of exponentials of each row that was computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype | None,
        returned: torch.dtype | None,
        high: torch.dtype | None,
        mean: bool,
        ignored: int,
        labelled: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, b)]
        ctx.shape, ctx.mean, ctx.ignored = x.shape, mean, ignored
        rows, kept = x.reshape(-1, x.shape[-1]), labels != ignored
        at = kept.nonzero()[:, 0] if labelled else None
        own = labels
        if at is not None:
            rows, own, kept = rows[at], labels[at], kept[at]
        rows, w, b = cast(rows, dtype), cast(w, dtype), cast(b, dtype)
        flat = cast(F.linear(rows, w, b), returned)
        entropy = flat.dtype if high is None else high
        wide = torch.promote_types(entropy, torch.float32)
        top = flat.amax(-1).to(wide)
        total = torch.zeros_like(top)
        for part in _pieces(flat, flat.shape[1]):
            total += (flat[:, part] - top[:, None]).exp_().sum(-1)
        lse = top + total.log()
        picked = flat.gather(1, own.where(kept, 0)[:, None])[:, 0]
        loss = (lse - picked).where(kept, 0).sum()
        loss = cast(loss / kept.sum() if mean else loss, entropy if dtype is None else wide)
        logits = flat
        if at is not None:
            logits = flat.new_zeros(labels.shape[0], flat.shape[1]).index_copy_(0, at, flat)
        logits = logits.reshape(*x.shape[:-1], -1)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, w, labels, logits, lse, at)
        return logits, loss

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, g_logits: Tensor | None, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, labels, logits, lse, at = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        given = None if g_logits is None else g_logits.reshape(flat.shape)
        if at is not None:
            labels = labels[at]
        elif given is None and _worth_choosing(labels):
            at = (labels != ctx.ignored).nonzero()[:, 0]
            x, lse, labels = None if x is None else x[at], lse[at], labels[at]
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        d_b = w.new_empty(w.shape[0]) if ctx.needs_input_grad[2] else None
        # Pieces of half precision are summed in float32, or each sum would be rounded.
        d_x = lse.new_zeros(lse.shape[0], w.shape[1]) if ctx.needs_input_grad[0] else None
        kept = labels != ctx.ignored
        weight = torch.zeros_like(lse)
        if g_loss is not None:
            weight = (g_loss / kept.sum() if ctx.mean else g_loss.expand(len(lse))).where(kept, 0)
        for part in _pieces(lse, flat.shape[1]):
            piece = (_rows(flat[:, part], at) - lse[:, None]).exp_()
            # A sum, and no choice of rows, for which a GPU would have to be waited for.
            here = (labels >= part.start) & (labels < part.stop)
            column = (labels - part.start).clamp(0, piece.shape[1] - 1)
            piece.scatter_add_(1, column[:, None], -here.to(piece.dtype)[:, None])
            piece *= weight[:, None]
            if given is not None:
                piece += _rows(given[:, part], at)
            piece = piece.to(w.dtype)
            if d_x is not None:
                d_x = d_x.addmm_(piece, w[part]) if d_x.dtype == w.dtype else d_x.add_(piece @ w[part])
            if d_w is not None:
                d_w[part] = piece.t() @ x
            if d_b is not None:
                d_b[part] = piece.sum(0)
        if d_x is not None:
            if at is not None:
                d_x = d_x.new_zeros(flat.shape[0], d_x.shape[1]).index_copy_(0, at, d_x)
            d_x = d_x.reshape(ctx.shape)
        return *map(cast, (d_x, d_w, d_b), ctx.dtypes), *[None] * 7


def _worth_choosing(labels: Tensor) -> bool:
    """Whether rows without a label are found at no cost: a GPU would be waited for, and a compiler stop."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(piece: Tensor, at: Tensor | None) -> Tensor:
    return piece if at is None else piece[at]


def _pieces(rows: Tensor, columns: int) -> Iterator[slice]:
    """The columns of the logits of these rows, some at a time."""
    width = max(LEAST, PIECE // max(len(rows), 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
