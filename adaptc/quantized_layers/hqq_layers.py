"""Read layers of HQQ: ``HQQLinear``, with codes of 8, 6, 5 or 4 bits.

The weight is reshaped to groups. An element's value is (code - zero) * scale, with a scale and a zero for each group.
Both are floats. With axis 1 a group is a run of ``group_size`` elements. With axis 0 the weight is reshaped to
(group_size, groups), and a group is a column of that. Its elements lie in one column of the weight, some rows apart.
Codes of 4 bits are packed along the first axis of the reshaped weight, those of its first half in the high bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.passes.quantized.integer_scheme import IntegerScheme, pack_nibbles
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.linear_layer import (
    LayerReader,
    as_plain_tensor,
    class_path,
    dtype_name,
    make_weight,
    require_tensor,
)

_LINEAR = "hqq.core.quantize.HQQLinear"
_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8"}
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _find_codes(module: nn.Module) -> Tensor | None:
    codes = getattr(module, "W_q", None) if class_path(type(module)) == _LINEAR else None
    return codes if isinstance(codes, Tensor) else None


def _read(module: Any, dtype: torch.dtype) -> QuantizedTensor:
    meta = dict(getattr(module, "meta", None) or {})
    bits, axis = meta.get("nbits"), meta.get("axis")
    if bits not in _BITS or meta.get("packing") != _BITS[bits]:
        raise CaptureError(
            f"it has codes of {bits} bits in the packing {meta.get('packing')!r}, and HQQ layers of "
            f"{', '.join(f'{b} bits ({p})' for b, p in _BITS.items())} are read"
        )
    if meta.get("quant_scale") or meta.get("quant_zero") or "zero_scale" in meta:
        raise CaptureError("its scales or zeros are quantised, too: make it with quant_scale=False, quant_zero=False")
    rows, columns = (int(s) for s in meta["shape"])
    group = meta.get("group_size") or (columns if axis == 1 else rows)
    if axis not in (0, 1) or (columns if axis == 1 else rows) % group:
        raise CaptureError(
            f"its groups of {group} along axis {axis} go across {'rows' if axis else 'columns'} of its weight "
            f"({rows}, {columns}): a group_size that divides its {'inputs' if axis else 'outputs'} is read"
        )
    groups = rows * columns // group
    grouped = (groups, group) if axis == 1 else (group, groups)
    by_group = (groups, 1) if axis == 1 else (1, groups)
    packed = as_plain_tensor(module.W_q)
    packed = packed.view(torch.uint8) if meta.get("view_as_float") else packed
    halves = 2 if bits == 4 else 1
    packed = require_tensor("W_q", packed, (grouped[0] // halves, grouped[1]), [torch.uint8])
    codes = torch.cat([packed >> 4, packed & 15]) if bits == 4 else packed
    scales = require_tensor("meta['scale']", meta.get("scale"), by_group, _FLOAT_DTYPES)
    zeros = require_tensor("meta['zero']", meta.get("zero"), by_group, _FLOAT_DTYPES)
    codes, scales, zeros = codes.reshape(rows, columns), scales.reshape(-1), zeros.reshape(-1)
    stored = {}
    if axis == 0:
        # The stored matrix is the transpose, whose groups are not runs.
        count = rows // group
        codes, (scales, zeros) = codes.t(), (t.reshape(count, columns).t().contiguous() for t in (scales, zeros))
        stored["group_index"] = torch.arange(rows, dtype=torch.int32, device=codes.device) % count
    else:
        scales, zeros = scales.reshape(rows, -1), zeros.reshape(rows, -1)
    stored |= {"scales": scales, "zeros": zeros}
    stored["codes"] = pack_nibbles(codes) if bits == 4 else (codes.short() - 128).to(torch.int8).contiguous()
    scheme = IntegerScheme(
        bits=4 if bits == 4 else 8,
        group_size=group,
        offset=0 if bits == 4 else -128,
        scale_dtype=dtype_name(scales),
        zero_dtype=dtype_name(zeros),
        has_group_index=axis == 0,
    )
    names = {"codes": "W_q", "scales": "meta['scale']", "zeros": "meta['zero']", "group_index": "meta['shape']"}
    return make_weight(scheme, stored, names, (rows, columns), module.compute_dtype, is_transposed=axis == 0)


HQQ = LayerReader("HQQLinear of hqq with 8, 6, 5 or 4 bits", _find_codes, _read)
