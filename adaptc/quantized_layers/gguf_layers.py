"""Read layers that hold blocks of GGUF files: ``GGUFLinear`` of diffusers and ``GgufLinear`` of transformers.

A layer of diffusers computes in its ``compute_dtype``, one of transformers in the dtype of its input, which is the
model's. Blocks are rewritten, so the weight of ours has tensors of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.gguf_blocks import BLOCK_TYPES, block_type, rewrite_blocks
from adaptc.quantized_layers.linear_layer import LayerReader, as_plain_tensor, class_path, make_weight, require_tensor

_DIFFUSERS = "diffusers.quantizers.gguf.utils.GGUFLinear"
_TRANSFORMERS = "transformers.integrations.gguf.utils.GgufLinear"


def _find_codes(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    kind = class_path(type(module))
    if not isinstance(weight, Tensor):
        return None
    is_read = kind == _DIFFUSERS and hasattr(weight, "quant_type")
    is_read |= kind == _TRANSFORMERS and hasattr(module, "ggml_type")
    return weight if is_read else None


def _read(module: Any, dtype: torch.dtype) -> QuantizedTensor:
    weight = module.weight
    if class_path(type(module)) == _DIFFUSERS:
        quant_type, data, dtype = weight.quant_type, weight.as_tensor(), module.compute_dtype or dtype
    else:
        quant_type, data = module.ggml_type, weight
        if getattr(module, "input_permutation", None) is not None:
            raise CaptureError("it has an input_permutation, which is not read: dequantise this layer")
    kind = block_type(quant_type)
    rows, columns = module.out_features, module.in_features
    if columns % kind.elements:
        raise CaptureError(f"its rows have {columns} elements, and blocks of {kind.name} have {kind.elements}")
    data = require_tensor("weight", data, (rows, columns // kind.elements * kind.nbytes), [torch.uint8])
    scheme, stored = rewrite_blocks(as_plain_tensor(data), quant_type)
    return make_weight(scheme, stored, dict.fromkeys(stored, "weight"), (rows, columns), dtype)


GGUF = LayerReader(
    f"GGUFLinear of diffusers and GgufLinear of transformers with {', '.join(b.name for b in BLOCK_TYPES.values())}",
    _find_codes,
    _read,
)
