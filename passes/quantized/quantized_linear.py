"""Multiply by a quantised matrix, and look rows up in one, without a float copy of it that lasts.

    adaptc::qlinear(x, stored, bias, scheme, rows, columns)   x (..., columns) -> (..., rows) of x's dtype
    adaptc::packed_linear(..., packed)                        the same; for few rows by a kernel that reads ``packed``

``stored`` are the scheme's tensors in the order of its layout, ``scheme`` its text (see ``all_schemes``). The gradient
of ``x`` and of the bias is made of the same tensors: the matrix is frozen, and nothing keeps its float values from the
forward to the backward. Where another way to compute the matmul is faster, ``quantized_kernels`` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.op_rules import decompose_in_transforms
from adaptc.passes.quantized.all_schemes import scheme_from_text
from adaptc.passes.quantized.bitsandbytes_kernels import dequantize_matrix
from adaptc.passes.quantized.fast_linear import (
    INT4_ROLES,
    linear_by_kernel,
    multiply_packed_table,
    takes_int4_kernel,
    takes_table_kernel,
)
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.scheme import Scheme
from adaptc.passes.quantized.table_scheme import TableScheme
from adaptc.torch_typing import custom_op

#: how many elements are dequantised at once
BLOCK_ELEMENTS = 1 << 18


def quantized_linear(
    x: Tensor, scheme: str, stored: Sequence[Tensor], shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias, (..., rows), for the matrix W of ``shape`` (rows, columns).

    ``scheme`` is the text of its scheme, and ``stored`` the tensors in the order of the scheme's layout.
    """
    rows, columns = shape
    return torch.ops.adaptc.qlinear(x, list(stored), bias, scheme, rows, columns)


def quantized_matmul(
    g: Tensor, scheme: str, stored: Sequence[Tensor], shape: Sequence[int], total: Tensor | None = None
) -> Tensor:
    """Return g W, (..., columns), for the matrix W of :func:`quantized_linear`.

    ``total`` (..., columns) is added to it. Nothing is recorded for a gradient.
    """
    rows, columns = shape
    with torch.no_grad():
        return _matmul_by_blocks(g, stored, scheme, rows, columns, total)


def quantized_embedding(
    scheme: Scheme, stored: Mapping[str, Tensor], shape: Sequence[int], indices: Tensor, dtype: torch.dtype
) -> Any:
    """Return the rows ``indices`` (...) of the matrix of ``shape``, as (..., columns) of ``dtype``.

    Returns NotImplemented for a scheme whose rows cannot be read one by one.
    """
    found = scheme.select_rows(stored, shape, indices.reshape(-1))
    if found is None:
        return NotImplemented
    picked, tensors = found
    return dequantize_matrix(picked, tensors, indices.numel(), shape[1], dtype).reshape(*indices.shape, shape[1])


def _values(stored: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    read = scheme_from_text(scheme)
    by_role = dict(zip(read.layout(rows, columns), stored, strict=True))
    return read.dequantize(by_role, rows, columns).to(dtype)


def _plain_qlinear(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    weight = _values(stored, scheme, rows, columns, x.dtype)
    read = scheme_from_text(scheme)
    if read.rounds_inputs:  # the rounding is no part of the derivative
        x = x + (read.round_input(x) - x).detach()
    return F.linear(x, weight, bias)


class _Block(NamedTuple):
    """Some rows of a matrix: values (rows, columns) times ``scales`` (rows,), where there are any."""

    rows: slice
    values: Tensor
    scales: Tensor | None = None


def _blocks(stored: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Iterator[_Block]:
    """Yield the matrix in blocks of rows: a block stays in the processor's cache."""
    read = scheme_from_text(scheme)
    read, by_role = read.with_plain_scales(dict(zip(read.layout(rows, columns), stored, strict=True)))
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    if isinstance(read, IntegerScheme) and read.has_row_scales and dtype == torch.bfloat16:
        # Codes of 8 bits are exact in bfloat16. Scaling the results instead of the codes is one pass less over them.
        scales = (by_role["scales"][:, 0].float() * read.step).to(dtype)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            yield _Block(block, by_role["codes"][block].to(dtype), scales[block])
        return
    if step >= rows or read.select_rows(by_role, (rows, columns), slice(0, 1)) is None:
        yield _Block(slice(0, rows), dequantize_matrix(read, by_role, rows, columns, dtype))
        return
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        found = read.select_rows(by_role, (rows, columns), block)
        assert found is not None
        yield _Block(block, dequantize_matrix(*found, block.stop - start, columns, dtype))


@custom_op("adaptc::qlinear", mutates_args=())
def qlinear_op(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    """Compute the matmul as an op, for graphs and for gradients."""
    x = scheme_from_text(scheme).round_input(x)
    parts: list[Tensor] = []
    for block in _blocks(stored, scheme, rows, columns, x.dtype):
        own_bias = None if bias is None else bias[block.rows]
        if block.scales is None:
            parts.append(F.linear(x, block.values, own_bias))
        else:
            scaled = F.linear(x, block.values).mul_(block.scales)
            parts.append(scaled if own_bias is None else scaled.add_(own_bias))
    if not parts:
        return x.new_empty((*x.shape[:-1], 0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@qlinear_op.register_fake
def _(x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int) -> Tensor:
    return F.linear(x, x.new_empty((rows, columns)), bias)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stored, _, ctx.scheme, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    need_x, _, need_bias = ctx.needs_input_grad[:3]
    stored = ctx.saved_tensors  # once: torch's checkpoint gives them no second time
    gx = _matmul_by_blocks(g, stored, ctx.scheme, ctx.rows, ctx.columns) if need_x else None
    no_gradients = [None] * len(stored)
    return gx, no_gradients, g.reshape(-1, g.shape[-1]).sum(0) if need_bias else None, None, None, None


def _matmul_by_blocks(
    g: Tensor, stored: Sequence[Tensor], scheme: str, rows: int, columns: int, total: Tensor | None = None
) -> Tensor:
    """Return g W (..., columns), plus ``total``, for g (..., rows) and the matrix W (rows, columns)."""
    # Sums over blocks are rounded to the dtype of g once, as those of one matmul are: there may be hundreds of blocks.
    sums = None if total is None else total.to(_sum_dtype(g.dtype), copy=True)
    for block in _blocks(stored, scheme, rows, columns, g.dtype):
        own = g[..., block.rows] if block.scales is None else g[..., block.rows] * block.scales
        part = own @ block.values
        if block.rows == slice(0, rows) and sums is None:
            return part
        sums = part.to(_sum_dtype(g.dtype)) if sums is None else sums.add_(part)
    return g.new_zeros((*g.shape[:-1], columns)) if sums is None else sums.to(g.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


qlinear_op.register_autograd(_backward, setup_context=_save_for_backward)
decompose_in_transforms("qlinear", _plain_qlinear)


@custom_op("adaptc::packed_linear", mutates_args=())
def packed_linear_op(
    x: Tensor,
    stored: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
    rows: int,
    columns: int,
    packed: Sequence[Tensor],
) -> Tensor:
    """Compute the matmul of a weight that is stored by a table or in 4 bits, of which kernels have a copy."""
    read = scheme_from_text(scheme)
    if isinstance(read, TableScheme) and takes_table_kernel(x):
        return multiply_packed_table(x, read, packed, (rows, columns), bias)
    if isinstance(read, IntegerScheme) and takes_int4_kernel(x):
        return linear_by_kernel("int4", read, x, dict(zip(INT4_ROLES, packed, strict=True)), bias)
    return torch.ops.adaptc.qlinear(x, stored, bias, scheme, rows, columns)


@packed_linear_op.register_fake
def _(
    x: Tensor,
    stored: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
    rows: int,
    columns: int,
    packed: Sequence[Tensor],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _save_packed_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *plain, packed = inputs
    ctx.packed_count = len(packed)
    _save_for_backward(ctx, tuple(plain), output)


def _packed_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return *_backward(ctx, g), [None] * ctx.packed_count


def _plain_packed_linear(*args: Any) -> Tensor:
    return _plain_qlinear(*args[:-1])


packed_linear_op.register_autograd(_packed_backward, setup_context=_save_packed_for_backward)
decompose_in_transforms("packed_linear", _plain_packed_linear)
