"""Read layers of bitsandbytes: ``Linear4bit``, with its NF4 and FP4 weights, and ``Linear8bitLt``.

A 4-bit weight is stored as ``TableScheme`` stores it, so its tensors are shared. In eval mode on some CPUs the library
packs a 4-bit weight anew for its own kernel, and its scales become bfloat16. Such a weight is read as it then is. The
library's AVX-512 kernel takes wrong scales where rows are no whole number of blocks. Here these weights have the values
that the library's quantiser and its other kernels give them.

A ``Linear8bitLt`` has a row of int8 codes CB and a scale SCB for each output. Its values are CB * SCB * (1 / 127). In
eval mode the library also rounds the layer's input to int8, but for columns with outliers. Here the input is not
rounded, as in the library's own training. So the layer's output is the more exact one of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.table_scheme import TABLES, TableScheme
from adaptc.quantized_layers.linear_layer import LayerReader, as_plain_tensor, class_path, make_weight, require_tensor

_LINEAR_4BIT = frozenset(f"bitsandbytes.nn.modules.{n}" for n in ("Linear4bit", "LinearNF4", "LinearFP4"))
_LINEAR_8BIT = "bitsandbytes.nn.modules.Linear8bitLt"
#: 1 / 127 as the library writes it
STEP_8BIT = 7.874015718698502e-3
_NOT_QUANTIZED = "holds a weight that is not quantised yet: move the model to its device first, model.to(device)"
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _find_codes(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    kind = class_path(type(module))
    is_read = kind in _LINEAR_4BIT and type(weight).__name__ == "Params4bit"
    is_read |= kind == _LINEAR_8BIT and type(weight).__name__ == "Int8Params"
    return weight if is_read and isinstance(weight, Tensor) else None


def _read(module: nn.Module, dtype: torch.dtype) -> QuantizedTensor:
    if class_path(type(module)) == _LINEAR_8BIT:
        return _read_8bit(module, dtype)
    return _read_4bit(module)


def _read_4bit(module: Any) -> QuantizedTensor:
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise CaptureError(f"it {_NOT_QUANTIZED}")
    if state.quant_type not in TABLES:
        raise CaptureError(f"its quant_type is {state.quant_type!r}, and {', '.join(TABLES)} are read")
    shape = (module.out_features, module.in_features)
    if tuple(state.shape) != shape:
        raise CaptureError(
            f"its quant_state is of a weight {tuple(state.shape)}, and the layer has one of {shape}: quantise it from "
            "a weight (out_features, in_features)"
        )
    scale_block = 0
    stored = {"table": as_plain_tensor(state.code)}
    names = {"codes": "weight", "table": "weight.quant_map", "scales": "weight.absmax"}
    if getattr(state, "packing_format_for_cpu", False):
        stored |= _unpack_for_cpu(as_plain_tensor(weight), state, shape)
        stored_dtype = state.original_dtype
    else:
        stored |= {"codes": as_plain_tensor(weight).reshape(-1).view(torch.uint8), "scales": state.absmax}
        stored_dtype = state.dtype
        if state.nested:
            scale_block = state.state2.blocksize
            stored |= {"scale_table": state.state2.code, "super_scales": state.state2.absmax}
            stored |= {"scale_offset": state.offset}
            names |= {"scale_table": "weight.nested_quant_map", "super_scales": "weight.nested_absmax"}
            names |= {"scale_offset": "weight.nested_offset"}
    # Without a dtype of its own the layer computes in that of its first input: the model's, as the weight was.
    compute = module.compute_dtype if module.compute_dtype in _FLOAT_DTYPES else stored_dtype
    return make_weight(TableScheme(state.quant_type, state.blocksize, scale_block), stored, names, shape, compute)


def _unpack_for_cpu(packed: Tensor, state: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return codes and scales of a weight that the library packed for its kernel on CPUs, by role.

    Each run of 32 bytes holds 64 codes of 32 rows: first the low halves of all bytes, then the high halves. The scales
    are (groups, rows).
    """
    rows, columns = shape
    packed = require_tensor("weight", packed, (rows, columns // 2), [torch.uint8]).reshape(-1, 32)
    halves = torch.cat([packed & 15, packed >> 4], 1).reshape(rows // 32, columns // 2, 32, 2)
    pairs = halves.transpose(1, 2).reshape(-1, 2)
    groups = columns // state.blocksize
    scales = require_tensor("weight.absmax", state.absmax, (groups, rows), [torch.bfloat16])
    return {"codes": (pairs[:, 0] << 4) | pairs[:, 1], "scales": scales.t().float().reshape(-1)}


def _read_8bit(module: Any, dtype: torch.dtype) -> QuantizedTensor:
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        raise CaptureError(
            "it has has_fp16_weights=True, so it rounds a plain weight in every call: make it with "
            "has_fp16_weights=False"
        )
    if weight.dtype != torch.int8:
        raise CaptureError(f"it {_NOT_QUANTIZED}")
    shape = (module.out_features, module.in_features)
    # Before the first call the weight has the scales, afterwards the state has them.
    scales = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    scales = require_tensor("SCB", scales, (shape[0],), [torch.float32])
    stored = {"codes": as_plain_tensor(weight), "scales": scales.reshape(-1, 1)}
    compute = dtype if module.bias is None or module.bias.dtype not in _FLOAT_DTYPES else module.bias.dtype
    return make_weight(IntegerScheme(step=STEP_8BIT), stored, {"codes": "weight", "scales": "SCB"}, shape, compute)


BITSANDBYTES = LayerReader("Linear4bit and Linear8bitLt of bitsandbytes", _find_codes, _read)
