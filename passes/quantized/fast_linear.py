"""Multiply by a quantised matrix with kernels for a CPU, where there is one for the scheme and the call.

    integer, 8 bits, int8 activations   any dtype, any rows    ``_int_mm`` of the rounded input
    integer, 8 bits, a scale per row    bfloat16, few rows     ``_weight_int8pack_mm``
    integer, 4 bits in groups           bfloat16, few rows     ``_weight_int4pack_mm_for_cpu`` of a packed copy
    table                               bfloat16, few rows     bitsandbytes' kernel, of a copy in another order

The limits of rows are those above which a matmul of dequantised values is faster on CPUs with AVX-512. Results differ
from those of dequantised values by rounding: the first one's sums are exact, and the last two read scales and zeros as
bfloat16.

Private torch use: the first three ops, which have no public names. Public: none; torchao calls the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.passes.quantized.bitsandbytes_kernels import MAX_ROWS, multiply_few_rows, pack_weight
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.scheme import Scheme, StoredMatrix
from adaptc.passes.quantized.table_scheme import TableScheme


class PreparedWeight(StoredMatrix, Protocol):
    """A quantised weight, which keeps what kernels made of it."""

    def prepared(self, key: str, prepare: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what ``prepare`` makes of this weight, made at the first call and kept under ``key``."""
        ...


aten: Any = torch.ops.aten

#: the numbers of rows up to which the kernels of each are faster
INT8_ROWS, INT4_ROWS = 8, 32
#: the roles of the tensors that the kernel for 4 bits reads
INT4_ROLES = ("packed_codes", "group_scales")
#: the columns that the kernel for 8 bits reads at once: it reads past the end of a row of another number
_INT8_COLUMNS = 32
#: group sizes that the kernel for 4 bits takes
_INT4_GROUPS = (32, 64, 128, 256)


def fast_linear(x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor | None:
    """Return x W^T + bias, (..., rows) of ``x``'s dtype, for a call without gradients; None without a kernel for it."""
    if isinstance(weight.scheme, TableScheme):
        return _table_linear(x, weight, bias)
    kind = kernel_for(weight, x.dtype)
    if kind is None or x.device.type != "cpu":
        return None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if kind != "int8_dynamic" and not 0 < rows.shape[0] <= (INT8_ROWS if kind == "int8" else INT4_ROWS):
        return None
    return linear_by_kernel(kind, weight.scheme, x, prepared_tensors(kind, weight), bias)


def _table_linear(x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor | None:
    scheme, packed = weight.scheme, packed_table(weight) if takes_table_kernel(x) else ()
    if not packed or not isinstance(scheme, TableScheme):
        return None
    return multiply_packed_table(x, scheme, packed, weight.matrix_shape, bias)


def takes_table_kernel(x: Tensor) -> bool:
    """Return whether the kernel for tables is the faster one for an input (..., columns)."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < prod(x.shape[:-1]) <= MAX_ROWS


def takes_int4_kernel(x: Tensor) -> bool:
    """Return whether the kernel for 4 bits is the faster one for an input (..., columns)."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < prod(x.shape[:-1]) <= INT4_ROWS


def packed_table(weight: PreparedWeight) -> tuple[Tensor, ...]:
    """Return the copy of a weight of a table that the kernel reads, made once; () where it cannot read it."""

    def pack(of: PreparedWeight) -> tuple[Tensor, ...]:
        plain, tensors = of.scheme.with_plain_scales(of.stored)
        return pack_weight(plain, tensors, of.matrix_shape) if isinstance(plain, TableScheme) else ()

    return weight.prepared("table", pack)


def multiply_packed_table(
    x: Tensor, scheme: TableScheme, packed: Sequence[Tensor], shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias (..., rows), of what :func:`packed_table` gives for the matrix W of ``shape``."""
    y = multiply_few_rows(x.reshape(-1, x.shape[-1]).contiguous(), scheme, packed, shape)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def kernel_for(weight: PreparedWeight, dtype: torch.dtype) -> str | None:
    """Return the name of torch's kernel for this weight and inputs of ``dtype``; None where there is none.

    The names are "int8_dynamic", "int8" and "int4". The last two are for few rows, as the limits above say.
    """
    scheme = weight.scheme
    if not isinstance(scheme, IntegerScheme) or scheme.has_group_index or scheme.bits == 6:
        return None
    if scheme == IntegerScheme(activations="int8"):
        return "int8_dynamic"
    if dtype != torch.bfloat16:
        return None
    if scheme.bits == 8:
        fits = not weight.matrix_shape[1] % _INT8_COLUMNS and weight.stored["codes"].is_contiguous()
        return "int8" if scheme.has_row_scales and fits else None
    return "int4" if _has_int4_kernel(scheme, weight) else None


def prepared_tensors(kind: str, weight: PreparedWeight) -> dict[str, Tensor]:
    """Return the tensors that the kernel ``kind`` reads, by role: stored ones, and those it keeps of them."""
    if kind == "int8_dynamic":
        return {role: weight.stored[role] for role in ("codes", "scales")}
    if kind == "int8":
        (scales,) = weight.prepared("int8", _row_scales)
        return {"codes": weight.stored["codes"], "row_scales": scales}
    packed, scales = weight.prepared("int4", _pack_int4)
    return dict(zip(INT4_ROLES, (packed, scales), strict=True))


def linear_by_kernel(
    kind: str, scheme: Scheme, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias by the kernel ``kind``, of what :func:`prepared_tensors` gives for a weight of ``scheme``."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if kind == "int8_dynamic":
        y = _int8_dynamic(rows, tensors)
    elif kind == "int8":
        y = aten._weight_int8pack_mm(rows, tensors["codes"], tensors["row_scales"])
    else:
        assert isinstance(scheme, IntegerScheme)
        y = aten._weight_int4pack_mm_for_cpu(rows, tensors["packed_codes"], scheme.group_size, tensors["group_scales"])
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def _int8_dynamic(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    values = x.float()
    steps = values.abs().amax(-1, keepdim=True) / 127
    codes = (values / torch.where(steps == 0, 1.0, steps)).round().to(torch.int8)
    # torch counts any stride of an axis of size one as contiguous. The kernel does not, and would read other memory.
    codes = torch.as_strided(codes, codes.shape, (codes.shape[1], 1))
    weight = tensors["codes"]
    sums: Tensor = aten._int_mm(codes, weight.reshape(1, -1) if weight.shape[1] == 1 else weight.t())
    return (sums * (steps * tensors["scales"].t())).to(x.dtype)


def _row_scales(weight: PreparedWeight) -> tuple[Tensor, ...]:
    """Return the scales (rows,) as bfloat16."""
    scheme = weight.scheme
    assert isinstance(scheme, IntegerScheme)
    return ((weight.stored["scales"][:, 0].float() * scheme.step).bfloat16(),)


def _has_int4_kernel(scheme: IntegerScheme, weight: PreparedWeight) -> bool:
    rows, columns = weight.matrix_shape
    plain = scheme.bits == 4 and scheme.step == 1.0 and scheme.group_size in _INT4_GROUPS
    return plain and not rows % 16 and not columns % 2


def _pack_int4(weight: PreparedWeight) -> tuple[Tensor, ...]:
    """Return the kernel's copy of the codes, and its (groups, rows, 2) of scales and of values at code 8, bfloat16."""
    scheme, stored = weight.scheme, weight.stored
    assert isinstance(scheme, IntegerScheme)
    columns = weight.matrix_shape[1]
    codes = scheme.unpack_codes(stored, columns)
    packed: Tensor = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales = scheme.group_scales(stored, columns)
    zeros = stored["zeros"].float() if scheme.zero_dtype else 0.0
    middles = (8 - scheme.offset - zeros) * scales
    if scheme.has_minimums:
        middles = middles - scheme.group_minimums(stored, columns)
    return packed, torch.stack([scales, middles], -1).transpose(0, 1).contiguous().bfloat16()
