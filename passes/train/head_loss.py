"""Compute the cross entropy of a linear head and its backward, with the logits as the only tensor of their size.

A vocabulary makes the logits the largest tensor of a step. Autograd has four tensors of that size: logits, their log
softmax, and the gradients of both. Here only the logits are kept, since the module returns them. The backward computes
the rest again, some columns at a time, and multiplies these with their rows of W before it goes on.

A row without a label adds nothing to the loss. With ``labelled_only`` such rows are left out of the head's matmul, too.
Loss and gradients are equal, and the returned logits are zero there. Otherwise only the backward leaves such rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.train.autocast import cast, without_autocast
from adaptc.passes.train.base_products import MatmulKinds, base_input_gradient, base_matmul
from adaptc.passes.train.first_order import first_order_only, needs_plain_ops
from adaptc.torch_modes import autocast_dtype

#: the number of elements of the logits' gradient that are computed at a time: some megabytes, which caches hold
CHUNK_ELEMENTS = 2**21
#: the least number of columns that are computed at a time
MIN_CHUNK_COLUMNS = 256
#: the share of rows without a label up to which copying the other rows does not pay
MAX_UNLABELLED_SHARE = 1 / 16
#: the dtypes of labels that are class indices
INDEX_DTYPES = (torch.int64, torch.uint8)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    logits_dtype: torch.dtype | None,
    loss_dtype: torch.dtype | None,
    mean: bool,
    ignore_index: int,
    labelled_only: bool = False,
    kinds: MatmulKinds = (),
) -> tuple[Tensor, Tensor]:
    """Return (logits (..., V), their cross entropy): x (..., K), w (V, K), b (V,), labels (rows of x,) int64 or uint8.

    The loss is the mean or the sum over the rows whose label is not ``ignore_index``. ``logits_dtype`` is the dtype of
    the logits, None for that of the matmul. ``loss_dtype`` is the dtype they are cast to for the loss, None for their
    own. With ``labelled_only`` the logits of rows without a label are zero and are not computed.

    There are first-order gradients for x, w and b. Under autocast the matmul has autocast's dtype, and the loss is
    float32. ``kinds`` says which kinds of matmul to use with w; empty for torch's own. Plain ops compute all of it in
    transforms of ``torch.func`` and in forward mode.
    """
    if labels.dtype not in INDEX_DTYPES or labels.numel() * x.shape[-1] != x.numel():
        # Torch raises its own error for labels of another kind.
        F.cross_entropy(F.linear(x, w, b).reshape(-1, w.shape[0]), labels, ignore_index=ignore_index)
    if needs_plain_ops(x, w, b, labels):
        return _plain_cross_entropy(
            x, w, b, labels.long(), logits_dtype, loss_dtype, "mean" if mean else "sum", ignore_index, labelled_only
        )
    # Not inside the step: nonzero() makes a compiler break its graph, which it can do only outside of the step.
    at = _labelled_rows(labels != ignore_index, 0) if labelled_only else None
    step: Any = _LinearCrossEntropy  # torch gives apply no types
    return step.apply(
        x, w, b, labels.long(), at, autocast_dtype(x), logits_dtype, loss_dtype, mean, ignore_index, kinds
    )


def _plain_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    logits_dtype: torch.dtype | None,
    loss_dtype: torch.dtype | None,
    reduction: str,
    ignore_index: int,
    labelled_only: bool,
) -> tuple[Tensor, Tensor]:
    logits = cast(F.linear(x, w, b), logits_dtype)
    if labelled_only:
        logits = torch.where((labels != ignore_index).view(*x.shape[:-1], 1), logits, 0)
    flat = cast(logits.reshape(-1, w.shape[0]), loss_dtype)
    return logits, F.cross_entropy(flat, labels, ignore_index=ignore_index, reduction=reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    """The step of :func:`linear_cross_entropy`; it keeps the logits, and the log-sum-exp of each row that was
    computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        row_indices: Tensor | None,
        dtype: torch.dtype | None,
        logits_dtype: torch.dtype | None,
        loss_dtype: torch.dtype | None,
        mean: bool,
        ignore_index: int,
        kinds: MatmulKinds,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kinds = kinds
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, b)]
        ctx.shape, ctx.mean, ctx.ignore_index = x.shape, mean, ignore_index
        rows, is_labelled = x.reshape(-1, x.shape[-1]), labels != ignore_index
        rows, is_labelled = _select_rows(rows, row_indices), _select_rows(is_labelled, row_indices)
        rows, w, b = cast(rows, dtype), cast(w, dtype), cast(b, dtype)
        flat = cast(base_matmul(rows, w, b, kinds), logits_dtype)
        result_dtype = flat.dtype if loss_dtype is None else loss_dtype
        sum_dtype = torch.promote_types(result_dtype, torch.float32)
        top = flat.amax(-1).to(sum_dtype)
        total = torch.zeros_like(top)
        for part in _column_chunks(len(flat), flat.shape[1]):
            total += (flat[:, part] - top[:, None]).exp_().sum(-1)
        lse = top + total.log()
        picked = flat.gather(1, _select_rows(labels, row_indices).where(is_labelled, 0)[:, None])[:, 0]
        loss = (lse - picked).where(is_labelled, 0).sum()
        loss = cast(loss / is_labelled.sum() if mean else loss, result_dtype if dtype is None else sum_dtype)
        logits = flat
        if row_indices is not None:
            logits = flat.new_zeros(labels.shape[0], flat.shape[1]).index_copy_(0, row_indices, flat)
        logits = logits.reshape(*x.shape[:-1], w.shape[0])
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, w, labels, logits, lse, row_indices)
        return logits, loss

    @staticmethod
    @first_order_only("the loss with the head")
    @without_autocast
    def backward(ctx: Any, g_logits: Tensor | None, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, labels, logits, lse, row_indices = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        flat_g_logits = None if g_logits is None else g_logits.reshape(flat.shape)
        is_labelled = labels != ctx.ignore_index
        if row_indices is None and flat_g_logits is None and _is_cheap_to_count(labels):
            row_indices = _labelled_rows(is_labelled, MAX_UNLABELLED_SHARE)
            x, lse = None if x is None else _select_rows(x, row_indices), _select_rows(lse, row_indices)
        labels, is_labelled = _select_rows(labels, row_indices), _select_rows(is_labelled, row_indices)
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        d_b = w.new_empty(w.shape[0]) if ctx.needs_input_grad[2] else None
        # Pieces of half precision are summed in float32, or each sum would be rounded.
        d_x = lse.new_zeros(lse.shape[0], w.shape[1]) if ctx.needs_input_grad[0] else None
        weight = torch.zeros_like(lse)
        if g_loss is not None:
            weight = (g_loss / is_labelled.sum() if ctx.mean else g_loss.expand(len(lse))).where(is_labelled, 0)
        for columns in _column_chunks(len(lse), flat.shape[1]):
            d_logits = (_select_rows(flat[:, columns], row_indices) - lse[:, None]).exp_()
            # Every row takes part, with 0 where its label is elsewhere: to choose rows would wait for the GPU.
            here = (labels >= columns.start) & (labels < columns.stop)
            column = (labels - columns.start).clamp(0, d_logits.shape[1] - 1)
            d_logits.scatter_add_(1, column[:, None], -here.to(d_logits.dtype)[:, None])
            d_logits *= weight[:, None]
            if flat_g_logits is not None:
                d_logits += _select_rows(flat_g_logits[:, columns], row_indices)
            d_logits = d_logits.to(w.dtype)
            if d_x is not None:
                same = d_x.dtype == w.dtype
                made = base_input_gradient(d_logits, w[columns], ctx.kinds, d_x if same else None)
                d_x = made if same else d_x.add_(made)
            if d_w is not None and x is not None:
                d_w[columns] = d_logits.t() @ x
            if d_b is not None:
                d_b[columns] = d_logits.sum(0)
        if d_x is not None:
            if row_indices is not None:
                d_x = d_x.new_zeros(flat.shape[0], d_x.shape[1]).index_copy_(0, row_indices, d_x)
            d_x = d_x.reshape(ctx.shape)
        return *map(cast, (d_x, d_w, d_b), ctx.dtypes), *[None] * 8


def _is_cheap_to_count(labels: Tensor) -> bool:
    """Return whether counting the labelled rows is cheap: it would wait for a GPU, and break a compiler's graph."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _labelled_rows(is_labelled: Tensor, few: float) -> Tensor | None:
    """Return the indices of the rows in ``is_labelled``; None where at most the share ``few`` of all rows is not in
    it."""
    at = is_labelled.nonzero()[:, 0]
    return None if len(is_labelled) - len(at) <= few * len(is_labelled) else at


def _select_rows(t: Tensor, row_indices: Tensor | None) -> Tensor:
    return t if row_indices is None else t[row_indices]


def _column_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of the ``columns`` of the logits, so that a slice with all ``rows`` has about CHUNK_ELEMENTS
    elements."""
    width = max(MIN_CHUNK_COLUMNS, CHUNK_ELEMENTS // max(rows, 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
