"""Read weights of torchao: ``Int8Tensor`` and ``IntxUnpackedToInt8Tensor``, whose codes are shared.

These are the classes with integers that torchao makes on a CPU. ``Int8Tensor`` has a scale per row, per group of
columns or for the whole weight; its inputs may be rounded to int8 row by row. ``IntxUnpackedToInt8Tensor`` stores codes
of 1 to 8 bits as int8, with zeros where it is asymmetric.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptc.errors import CaptureError
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.linear_layer import as_plain_tensor, class_path, dtype_name, make_weight

_INT8 = "torchao.quantization.Int8Tensor"
_INTX = "torchao.quantization.IntxUnpackedToInt8Tensor"
TORCHAO_FORMATS = "weights of torchao that are an Int8Tensor or an IntxUnpackedToInt8Tensor"


def find_torchao_codes(weight: Tensor) -> Tensor | None:
    """Return the tensor with the codes of ``weight``, or None for a weight of another class."""
    codes = getattr(weight, "qdata", None) if class_path(type(weight)) in (_INT8, _INTX) else None
    return codes if isinstance(codes, Tensor) else None


def read_torchao_weight(weight: Any, name: str) -> QuantizedTensor:
    """Return the parameter ``weight``, called ``name``, as a weight of ours. Raises CaptureError where it cannot be
    read."""
    if weight.ndim != 2:
        raise CaptureError(f"its {name!r} is {tuple(weight.shape)}, and weights with two axes are read")
    rows, columns = weight.shape
    block_rows, block_columns = (int(b) for b in weight.block_size)
    groups = columns // max(block_columns, 1)
    if block_rows not in (1, rows):
        raise CaptureError(f"its {name!r} has scales for blocks of {block_rows} rows, and one or all rows are read")
    stored = {"codes": as_plain_tensor(weight.qdata), "scales": _by_row(weight.scale, rows, groups)}
    names = {"codes": f"{name}.qdata", "scales": f"{name}.scale", "zeros": f"{name}.zero_point"}
    zeros = weight.zero_point
    zero_dtype = ""
    if zeros is not None and bool((zeros != 0).any()):
        stored["zeros"], zero_dtype = _by_row(zeros, rows, groups), dtype_name(zeros)
    scheme = IntegerScheme(
        group_size=0 if block_columns == columns else block_columns,
        scale_dtype=dtype_name(weight.scale),
        zero_dtype=zero_dtype,
        activations=_activations(weight, name),
    )
    return make_weight(scheme, stored, names, (rows, columns), weight.dtype)


def _by_row(values: Tensor, rows: int, groups: int) -> Tensor:
    """Return ``values`` for each row, where all rows share one."""
    values = as_plain_tensor(values)
    return values.expand(rows, groups).contiguous() if tuple(values.shape) == (1, groups) else values


def _activations(weight: Any, name: str) -> str:
    """Return how the layer's input is rounded, as the scheme writes it. Raises CaptureError for other ways."""
    if class_path(type(weight)) == _INTX:
        if (way := weight.activation_quantization) is not None:
            raise CaptureError(
                f"its {name!r} rounds inputs by {str(getattr(way, 'value', way))!r}, and symmetric int8 per row is "
                "read: use IntxWeightOnlyConfig or Int8DynamicActivationInt8WeightConfig"
            )
        return "float"
    if weight.act_pre_scale is not None or weight.act_quant_scale is not None:
        raise CaptureError(f"its {name!r} has fixed scales of inputs, which are not read: use a dynamic config")
    way = weight.act_quant_kwargs
    if way is None:
        return "float"
    kind = (type(way.granularity).__name__, way.mapping_type.name, bool(way.reduce_range))
    if kind != ("PerRow", "SYMMETRIC", False):
        raise CaptureError(
            f"its {name!r} rounds inputs as {kind[0]}, {kind[1]}, reduce_range={kind[2]}, and PerRow, SYMMETRIC, "
            "reduce_range=False is read"
        )
    return "int8"
