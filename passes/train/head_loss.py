"""Compute the cross entropy of a linear head and its backward, with the logits as the only tensor of their size.

A vocabulary makes the logits the largest tensor of a step. Autograd has four tensors of that size: logits, their log
softmax, and the gradients of both. Here only the logits are kept, since the module returns them. The backward computes
the rest again, some columns at a time, and multiplies these with their rows of W before it goes on.

A row without a label adds nothing to the loss. With ``labelled`` such rows are left out of the head's matmul, too. Loss
and gradients are equal, and the returned logits are zero there. Otherwise only the backward leaves such rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.train.autocast import autocast_dtype, cast, without_autocast
from adaptc.passes.train.base_products import Told, base_gradient, base_product
from adaptc.passes.train.first_order import first_order, plain_only

#: the number of elements of the logits' gradient that are computed at a time: some megabytes, which caches hold
PIECE = 2**21
#: the least number of columns that are computed at a time
LEAST = 256
#: the share of rows without a label up to which copying the other rows does not pay
FEW = 1 / 16
#: the dtypes of labels that are class indices
INDICES = (torch.int64, torch.uint8)


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
    told: Told = (),
) -> tuple[Tensor, Tensor]:
    """Return (logits (..., V), their cross entropy): x (..., K), w (V, K), b (V,), labels (rows of x,) int64 or uint8.

    The loss is the mean or the sum over the rows whose label is not ``ignored``. ``returned`` is the dtype of the
    logits, None for that of the matmul. ``high`` is the dtype they are cast to for the loss, None for their own. With
    ``labelled`` the logits of rows without a label are zero and are not computed.

    There are first-order gradients for x, w and b. Under autocast the matmul has autocast's dtype, and the loss is
    float32. ``told`` says which kinds of matmul to use with w; empty for torch's own. Plain ops compute all of it in
    transforms of ``torch.func`` and in forward mode.
    """
    if labels.dtype not in INDICES or labels.numel() * x.shape[-1] != x.numel():
        # Torch raises its own error for labels of another kind.
        F.cross_entropy(F.linear(x, w, b).reshape(-1, w.shape[0]), labels, ignore_index=ignored)
    if plain_only(x, w, b, labels):
        return _written_out(x, w, b, labels.long(), returned, high, "mean" if mean else "sum", ignored, labelled)
    # Not inside the step: nonzero() makes a compiler break its graph, which it can do only outside of the step.
    at = _chosen(labels != ignored, 0) if labelled else None
    return _Loss.apply(x, w, b, labels.long(), at, autocast_dtype(x), returned, high, mean, ignored, told)


def _written_out(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    returned: torch.dtype | None,
    high: torch.dtype | None,
    reduction: str,
    ignored: int,
    labelled: bool,
) -> tuple[Tensor, Tensor]:
    logits = cast(F.linear(x, w, b), returned)
    if labelled:
        logits = torch.where((labels != ignored).view(*x.shape[:-1], 1), logits, 0)
    flat = cast(logits.reshape(-1, w.shape[0]), high)
    return logits, F.cross_entropy(flat, labels, ignore_index=ignored, reduction=reduction)


class _Loss(torch.autograd.Function):
    """The step of :func:`loss_of_layer`; it keeps the logits, and the log-sum-exp of each row that was computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        at: Tensor | None,
        dtype: torch.dtype | None,
        returned: torch.dtype | None,
        high: torch.dtype | None,
        mean: bool,
        ignored: int,
        told: Told,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.told = told
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, b)]
        ctx.shape, ctx.mean, ctx.ignored = x.shape, mean, ignored
        rows, kept = x.reshape(-1, x.shape[-1]), labels != ignored
        rows, kept = _rows(rows, at), _rows(kept, at)
        rows, w, b = cast(rows, dtype), cast(w, dtype), cast(b, dtype)
        flat = cast(base_product(rows, w, b, told), returned)
        entropy = flat.dtype if high is None else high
        wide = torch.promote_types(entropy, torch.float32)
        top = flat.amax(-1).to(wide)
        total = torch.zeros_like(top)
        for part in _pieces(len(flat), flat.shape[1]):
            total += (flat[:, part] - top[:, None]).exp_().sum(-1)
        lse = top + total.log()
        picked = flat.gather(1, _rows(labels, at).where(kept, 0)[:, None])[:, 0]
        loss = (lse - picked).where(kept, 0).sum()
        loss = cast(loss / kept.sum() if mean else loss, entropy if dtype is None else wide)
        logits = flat
        if at is not None:
            logits = flat.new_zeros(labels.shape[0], flat.shape[1]).index_copy_(0, at, flat)
        logits = logits.reshape(*x.shape[:-1], w.shape[0])
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, w, labels, logits, lse, at)
        return logits, loss

    @staticmethod
    @first_order("the loss with the head")
    @without_autocast
    def backward(ctx: Any, g_logits: Tensor | None, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, labels, logits, lse, at = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        given = None if g_logits is None else g_logits.reshape(flat.shape)
        kept = labels != ctx.ignored
        if at is None and given is None and _known(labels):
            at = _chosen(kept, FEW)
            x, lse = None if x is None else _rows(x, at), _rows(lse, at)
        labels, kept = _rows(labels, at), _rows(kept, at)
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        d_b = w.new_empty(w.shape[0]) if ctx.needs_input_grad[2] else None
        # Pieces of half precision are summed in float32, or each sum would be rounded.
        d_x = lse.new_zeros(lse.shape[0], w.shape[1]) if ctx.needs_input_grad[0] else None
        weight = torch.zeros_like(lse)
        if g_loss is not None:
            weight = (g_loss / kept.sum() if ctx.mean else g_loss.expand(len(lse))).where(kept, 0)
        for part in _pieces(len(lse), flat.shape[1]):
            piece = (_rows(flat[:, part], at) - lse[:, None]).exp_()
            # Every row takes part, with 0 where its label is elsewhere: to choose rows would wait for the GPU.
            here = (labels >= part.start) & (labels < part.stop)
            column = (labels - part.start).clamp(0, piece.shape[1] - 1)
            piece.scatter_add_(1, column[:, None], -here.to(piece.dtype)[:, None])
            piece *= weight[:, None]
            if given is not None:
                piece += _rows(given[:, part], at)
            piece = piece.to(w.dtype)
            if d_x is not None:
                same = d_x.dtype == w.dtype
                made = base_gradient(piece, w[part], ctx.told, d_x if same else None)
                d_x = made if same else d_x.add_(made)
            if d_w is not None and x is not None:
                d_w[part] = piece.t() @ x
            if d_b is not None:
                d_b[part] = piece.sum(0)
        if d_x is not None:
            if at is not None:
                d_x = d_x.new_zeros(flat.shape[0], d_x.shape[1]).index_copy_(0, at, d_x)
            d_x = d_x.reshape(ctx.shape)
        return *map(cast, (d_x, d_w, d_b), ctx.dtypes), *[None] * 8


def _known(labels: Tensor) -> bool:
    """Return whether counting the labelled rows is cheap: it would wait for a GPU, and break a compiler's graph."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _chosen(kept: Tensor, few: float) -> Tensor | None:
    """Return the indices of the rows in ``kept``; None where at most the share ``few`` of all rows is not in it."""
    at = kept.nonzero()[:, 0]
    return None if len(kept) - len(at) <= few * len(kept) else at


def _rows(t: Tensor, at: Tensor | None) -> Tensor:
    return t if at is None else t[at]


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of the ``columns`` of the logits, so that a slice with all ``rows`` has about PIECE elements."""
    width = max(LEAST, PIECE // max(rows, 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
