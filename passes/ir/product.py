"""One matrix product of a linear layer, by the library that is told to make it: ``adaptc::product``.

    product(x, W, bias, kind, classes, columns)      y = x W^T + bias

"linear" is ``F.linear``. "onednn" is oneDNN on the weight as it lies, without a copy or packing: in float32
``F.linear`` goes to MKL, which is slow on some processors. It holds for calls whose number of rows is in one of
``classes``, and where shapes, types and strides fit; every other call is ``F.linear``, so that a graph with this op
computes on every machine what the plain graph does, up to rounding. At ``columns``, classes as well, the same library
makes y^T = W x^T, in which a few rows are a few columns: the other way round they may take it three times as long. A
single row is made as two columns that are equal, for which it may read W in two thirds of the time that one takes. The
gradient of x is a product too, by ``kind``; those of W and bias are plain.

:func:`product` is what code of calls uses: an op of Python costs ten microseconds, and it goes through one only where
there is a gradient. Transforms of ``torch.func``, forward-mode derivatives and subclasses of tensors get ``F.linear``.

Private torch use, with the public route that was tried:
- ``torch.ops.mkldnn._linear_pointwise``: oneDNN on a plain weight. Public: ``F.linear`` chooses by itself, and
  ``torch.utils.mkldnn`` packs a copy of each weight and returns tensors of another layout.
- its overload ``binary``: the same, added to another tensor. Public: ``addmm``, which goes where ``F.linear`` goes.
- ``torch.ops.mkldnn._is_mkldnn_bf16_supported``: without bfloat16 in the processor the op above raises. Public: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from adaptc.errors import BackendError, shown
from adaptc.op_rules import plain_in_transforms
from adaptc.torch_modes import in_transform

LINEAR, ONEDNN = "linear", "onednn"
KINDS = (LINEAR, ONEDNN)
#: what is said of a product at the classes of ``columns``
COLUMNS = "columns"

#: the most rows of each class of calls but the last, which has no end
CLASSES = (1, 4, 16, 256)
ALL_CLASSES = tuple(range(len(CLASSES) + 1))


def row_class(rows: int) -> int:
    """The class of a call with so many rows."""
    return sum(rows > most for most in CLASSES)


def _found(overload: str = "default") -> Any:
    """An overload of torch's private op, or None where it has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), overload, None)


_pointwise = _found()
_pointwise_with = _found("binary")


@cache
def _bfloat16() -> bool:
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and bool(known())


def takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN can make products of this type here."""
    if _pointwise is None or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _bfloat16())


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int] = ()
) -> Tensor:
    """x W^T + bias: x (..., K), weight (N, K), bias (N,) or None -> (..., N), of x's type. ``kind``: one of
    :data:`KINDS`; ``classes``: the classes of rows it holds for; ``columns``: those at which y^T is made.

    Raises BackendError for a kind that does not exist, and whatever ``F.linear`` raises for operands that do not fit.
    """
    at = _class_of(x, weight, bias, kind)
    if (at not in classes and at not in columns) or in_transform():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return product_op(x, weight, bias, kind, classes, columns)
    return by_columns(x, weight, bias) if at in columns else _pointwise(x, weight, bias, "none", [], "")


def by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transpose of weight x^T, as a tensor of its own."""
    rows = x.reshape(-1, x.shape[-1])
    one = rows.shape[0] == 1
    y = torch.mm(weight, (torch.cat((rows, rows)) if one else rows).t()).t()
    y = (y[:1] if one else y).contiguous()
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], weight.shape[0])


def add_product(total: Tensor, x: Tensor, weight: Tensor, kind: str, classes: Sequence[int]) -> Tensor:
    """total + x W^T, in total's memory or in new: total (rows, N), x (rows, K), weight (N, K), all of one type; the
    rest as in :func:`product`. There is no gradient."""
    if _pointwise_with is None or not total.is_contiguous() or total.dtype != x.dtype:
        return total.addmm_(x, weight.t())
    if not _by_onednn(x, weight, None, kind, classes) or in_transform():
        return total.addmm_(x, weight.t())
    return _pointwise_with(x, total, weight, None, "add")


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Sequence[int]) -> bool:
    """Whether :func:`onednn` may make this product, of a call in one of ``classes``: where no gradient is wanted."""
    if not _by_onednn(x, weight, bias, ONEDNN, classes) or in_transform():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias))


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product, of what :func:`fits`; ``weight`` may be a packed copy of the one that does."""
    return _pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("adaptc::product", mutates_args=())
def product_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int]
) -> Tensor:
    """:func:`product` as an op, for graphs and for gradients."""
    at = _class_of(x, weight, bias, kind)
    if at in columns:
        return by_columns(x, weight, bias)
    return _pointwise(x, weight, bias, "none", [], "") if at in classes else F.linear(x, weight, bias)


@product_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int]
) -> Tensor:
    _check(kind)
    return F.linear(x, weight, bias)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise BackendError(f"product: unknown kind {shown(kind)}; choose one of {', '.join(KINDS)}")


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int]) -> bool:
    return _class_of(x, weight, bias, kind) in classes


def _class_of(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> int | None:
    """The class of a call that another product than linear's may make; None for all others."""
    if kind != ONEDNN:
        _check(kind)
        return None
    # Subclasses have rules for linear, and none for this.
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or x.device.type != "cpu" or weight.device.type != "cpu":
        return None
    dtype = x.dtype
    if not (dtype == weight.dtype and takes(dtype) and weight.ndim == 2 and x.ndim and x.layout == torch.strided):
        return None
    width, count = weight.shape[1], x.numel()
    if not count or x.shape[-1] != width:
        return None
    if bias is not None and not (
        type(bias) in _PLAIN and bias.dtype == dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()
    ):
        return None
    if weight.layout != torch.strided or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return None
    # Its derivative would be lost without a word.
    dual = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, weight, bias))
    return None if dual else row_class(count // width)


_PLAIN = (Tensor, nn.Parameter)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.kind, ctx.classes, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    rows = g.reshape(-1, g.shape[-1])
    return (
        product(g, weight.t(), None, ctx.kind, ctx.classes) if need_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
        rows.sum(0) if need_bias else None,
        None,
        None,
        None,
    )


product_op.register_autograd(_backward, setup_context=_save)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, *_: Any) -> Tensor:
    _check(kind)
    return F.linear(x, weight, bias)


plain_in_transforms("product", _plain)
