"""Compute the matmul of a linear layer by a chosen library: ``adaptc::product``.

    product(x, W, bias, kind, classes, columns)      y = x W^T + bias

The kind "linear" is ``F.linear``. The kind "onednn" is oneDNN on the weight as it lies, without a copy or packing. In
float32 ``F.linear`` goes to MKL, which is slow on some processors.

"onednn" applies to calls whose number of rows is in one of ``classes``, if shapes, types and strides fit. Every other
call is ``F.linear``. So a graph with this op computes on every machine what the plain graph does, up to rounding.

At the classes in ``columns``, the same library computes y^T = W x^T, where a few rows become a few columns. The other
way round they may take three times as long. A single row is computed as two equal columns. Reading W may then take two
thirds of the time that one column takes.

The gradient of x is also such a matmul, of the same ``kind``. The gradients of W and bias are plain.

Code of calls uses :func:`product`. An op of Python costs ten microseconds, and the function uses one only where there
is a gradient. Transforms of ``torch.func``, forward-mode derivatives and subclasses of tensors get ``F.linear``.

Private torch use, with the public route that was tried:
- ``torch.ops.mkldnn._linear_pointwise``: oneDNN on a plain weight. Public: ``F.linear`` chooses by itself, and
  ``torch.utils.mkldnn`` packs a copy of each weight and returns tensors of another layout.
- its overload ``binary``, which adds the result to another tensor. Public: ``addmm``, which uses the library that
  ``F.linear`` uses.
- ``torch.ops.mkldnn._is_mkldnn_bf16_supported``: on a processor without bfloat16 the op above raises. Public: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.errors import BackendError, short_repr
from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_modes import has_tangent, in_transform
from adaptc.torch_typing import custom_op

LINEAR, ONEDNN = "linear", "onednn"
MATMUL_KINDS = (LINEAR, ONEDNN)
#: the name of the way in which products at the classes of ``columns`` are computed
COLUMNS = "columns"
#: the name of the way in which products with a packed copy of the weight are computed
PACKED = "packed"

#: the most rows of each class of calls; one more class has all calls with more rows
ROW_CLASS_LIMITS = (1, 4, 16, 256)
ALL_ROW_CLASSES = tuple(range(len(ROW_CLASS_LIMITS) + 1))


def row_class(rows: int) -> int:
    """Return the class of a call with so many rows."""
    return sum(rows > most for most in ROW_CLASS_LIMITS)


def _find_pointwise_op(overload: str = "default") -> Any:
    """Return an overload of torch's private op, or None where torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), overload, None)


_pointwise = _find_pointwise_op()
_pointwise_with = _find_pointwise_op("binary")


@cache
def _has_bfloat16() -> bool:
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and bool(known())


def onednn_supports(dtype: torch.dtype) -> bool:
    """Return whether oneDNN can compute matmuls of this dtype here."""
    if _pointwise is None or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())


def linear_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int] = ()
) -> Tensor:
    """Return x W^T + bias, (..., N), of x's dtype, for x (..., K), weight (N, K) and bias (N,) or None.

    ``kind`` is one of :data:`MATMUL_KINDS`. ``classes`` are the classes of rows for which oneDNN is used, and
    ``columns`` those for which y^T is computed. Raises BackendError for an unknown kind, and whatever ``F.linear``
    raises for operands that do not fit.
    """
    call_class = _class_of(x, weight, bias, kind)
    if (call_class not in classes and call_class not in columns) or in_transform():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return linear_matmul_op(x, weight, bias, kind, classes, columns)
    return transposed_matmul(x, weight, bias) if call_class in columns else _pointwise(x, weight, bias, "none", [], "")


def transposed_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias as a contiguous tensor, computed as the transpose of weight x^T."""
    rows = x.reshape(-1, x.shape[-1])
    one = rows.shape[0] == 1
    y = torch.mm(weight, (torch.cat((rows, rows)) if one else rows).t()).t()
    y = (y[:1] if one else y).contiguous()
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], weight.shape[0])


def add_linear_matmul(total: Tensor, x: Tensor, weight: Tensor, kind: str, classes: Sequence[int]) -> Tensor:
    """Return total + x W^T, in the memory of ``total`` or in new memory, without a gradient.

    ``total`` is (rows, N), x (rows, K) and weight (N, K), all of one dtype. ``kind`` and ``classes`` are those of
    :func:`product`.
    """
    if _pointwise_with is None or not total.is_contiguous() or total.dtype != x.dtype:
        return total.addmm_(x, weight.t())
    if not _onednn_applies(x, weight, None, kind, classes) or in_transform():
        return total.addmm_(x, weight.t())
    return _pointwise_with(x, total, weight, None, "add")


def can_use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Sequence[int]) -> bool:
    """Return whether :func:`onednn` may compute this matmul: its class is in ``classes``, and no gradient is needed."""
    if not _onednn_applies(x, weight, bias, ONEDNN, classes) or in_transform():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias))


def onednn_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return oneDNN's x W^T + bias for operands that :func:`can_use_onednn`; ``weight`` may be a packed copy."""
    return _pointwise(x, weight, bias, "none", [], "")


@custom_op("adaptc::product", mutates_args=())
def linear_matmul_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int]
) -> Tensor:
    """Compute :func:`product` as an op, for graphs and for gradients."""
    call_class = _class_of(x, weight, bias, kind)
    if call_class in columns:
        return transposed_matmul(x, weight, bias)
    return _pointwise(x, weight, bias, "none", [], "") if call_class in classes else F.linear(x, weight, bias)


@linear_matmul_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int]
) -> Tensor:
    _check_kind(kind)
    return F.linear(x, weight, bias)


def _check_kind(kind: str) -> None:
    if kind not in MATMUL_KINDS:
        raise BackendError(f"product: unknown kind {short_repr(kind)}; choose one of {', '.join(MATMUL_KINDS)}")


def _onednn_applies(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int]) -> bool:
    return _class_of(x, weight, bias, kind) in classes


def _class_of(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> int | None:
    """Return the class of a call that oneDNN may compute; None for all other calls."""
    if kind != ONEDNN:
        _check_kind(kind)
        return None
    # A subclass of Tensor may have rules for linear, and has none for this op.
    if (
        type(x) not in _PLAIN_TYPES
        or type(weight) not in _PLAIN_TYPES
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
    ):
        return None
    dtype = x.dtype
    if not (
        dtype == weight.dtype and onednn_supports(dtype) and weight.ndim == 2 and x.ndim and x.layout == torch.strided
    ):
        return None
    width, count = weight.shape[1], x.numel()
    if not count or x.shape[-1] != width:
        return None
    if bias is not None and not (
        type(bias) in _PLAIN_TYPES and bias.dtype == dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()
    ):
        return None
    if weight.layout != torch.strided or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return None
    # The op would drop a forward-mode derivative without an error.
    dual = any(t is not None and has_tangent(t) for t in (x, weight, bias))
    return None if dual else row_class(count // width)


_PLAIN_TYPES = (Tensor, nn.Parameter)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.kind, ctx.classes, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    rows = g.reshape(-1, g.shape[-1])
    return (
        linear_matmul(g, weight.t(), None, ctx.kind, ctx.classes) if need_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
        rows.sum(0) if need_bias else None,
        None,
        None,
        None,
    )


linear_matmul_op.register_autograd(_backward, setup_context=_save_for_backward)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, *_: Any) -> Tensor:
    _check_kind(kind)
    return F.linear(x, weight, bias)


decompose_in_transforms("product", _plain_linear)
