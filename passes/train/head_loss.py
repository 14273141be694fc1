"""The cross entropy of a linear layer's outputs, and its backward, with these kept and nothing else of their size.

A vocabulary makes the logits the largest tensor of a step, and autograd has four of them: logits, their log softmax,
and the gradients of both. Here the logits are kept, since the module returns them; the rest is made again in the
backward, some columns at a time, each multiplied with its rows of W before the next are made.

A row without a label adds nothing to the loss. With ``labelled`` such rows are left out of the product, too: the loss
and its gradients are equal, the logits that are returned are zero there. Otherwise the backward alone leaves them out.
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

#: numbers that a piece of the gradient of the logits may have: some megabytes, which caches hold
PIECE = 2**21
#: and columns it has at least
LEAST = 256
#: share of rows without a label that is not worth a copy of the others
FEW = 1 / 16
#: types of labels that say which column is right
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
    """(logits (..., V), their cross entropy): x (..., K), w (V, K), b (V,), labels (rows of x,) int64 or uint8.

    The mean or the sum over the rows whose label is not ``ignored``. ``returned``: type of the logits, None for that
    of the product; ``high``: what they are cast to for the loss, None for their own. ``labelled``: logits of other rows
    are zero, and take no work. Gradients for x, w and b, once. Under autocast the product is in its type, the loss
    float32. ``told``: what computes the products with w, torch where nothing is said. In transforms of ``torch.func``
    and forward mode plain operators compute all of it.
    """
    if labels.dtype not in INDICES or labels.numel() * x.shape[-1] != x.numel():
        # Torch says what is wrong with these labels.
        F.cross_entropy(F.linear(x, w, b).reshape(-1, w.shape[0]), labels, ignore_index=ignored)
    if plain_only(x, w, b, labels):
        return _written_out(x, w, b, labels.long(), returned, high, "mean" if mean else "sum", ignored, labelled)
    # Outside of the step, where a compiler can stop for it.
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
    """Kept are the logits, which are returned, and the log of the sum of exponentials of each row that was computed."""

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
            # A sum, and no choice of rows, for which a GPU would have to be waited for.
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
    """Whether how many rows have a label is known at no cost: a GPU would be waited for, and a compiler stop."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _chosen(kept: Tensor, few: float) -> Tensor | None:
    """The rows that are kept; None for all of them where no more than ``few`` of them are not."""
    at = kept.nonzero()[:, 0]
    return None if len(kept) - len(at) <= few * len(kept) else at


def _rows(t: Tensor, at: Tensor | None) -> Tensor:
    return t if at is None else t[at]


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """The columns of the logits of so many rows, some at a time."""
    width = max(LEAST, PIECE // max(rows, 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
