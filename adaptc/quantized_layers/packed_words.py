"""Read layers whose codes are packed into words of 32 bits: those of GPTQ and AWQ.

Both have ``qweight``, ``qzeros`` and ``scales`` (groups, out). A group is a run of inputs, and an element's value is
(code - zero) * scale. Codes of 4 or 8 bits fill a word from its lowest bits on.

    GPTQ   qweight (in / codes per word, out): a word has codes of neighbouring inputs. qzeros (groups, out / codes per
           word). The first version of the format stores zeros less one, the second does not. ``g_idx`` (in,) is the
           group of each input; with act order, groups are no runs.
    AWQ    qweight (in, out / 8), qzeros (groups, out / 8), 4 bits: a word has codes of 8 neighbouring outputs, in the
           order 0, 2, 4, 6, 1, 3, 5, 7.

Source: AutoGPTQ, GPTQModel and AutoAWQ; their layers on other kernels pack their weights anew, and are not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.passes.quantized.integer_scheme import IntegerScheme, pack_nibbles
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.linear_layer import LayerReader, class_path, dtype_name, make_weight, require_tensor

#: modules of GPTQ layers that keep the format's own layout
_AUTO_GPTQ = frozenset(
    f"auto_gptq.nn_modules.qlinear.{m}"
    for m in ("qlinear_cuda", "qlinear_cuda_old", "qlinear_triton", "qlinear_tritonv2")
)
_GPTQMODEL = frozenset(
    f"gptqmodel.nn_modules.qlinear.{m}"
    for m in ("torch", "tritonv2", "qlinear_torch", "qlinear_tritonv2", "qlinear_cuda", "qlinear_cuda_old")
)
_AUTO_AWQ = frozenset({"awq.modules.linear.gemm.WQLinear_GEMM"})
#: modules of AWQ layers that keep the format's own layout
_GPTQMODEL_AWQ = frozenset(
    f"gptqmodel.nn_modules.qlinear.{m}" for m in ("torch_awq", "awq_torch", "gemm_awq", "awq_gemm")
)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_WORDS = (torch.int32, torch.int16, torch.int8)


def _is_awq(module: nn.Module) -> bool:
    return class_path(type(module)) in _AUTO_AWQ or type(module).__module__ in _GPTQMODEL_AWQ


def _find_gptq_codes(module: nn.Module) -> Tensor | None:
    return _codes(module) if type(module).__module__ in _AUTO_GPTQ | _GPTQMODEL else None


def _find_awq_codes(module: nn.Module) -> Tensor | None:
    return _codes(module) if _is_awq(module) else None


def _codes(module: nn.Module) -> Tensor | None:
    codes = getattr(module, "qweight", None)
    return codes if isinstance(codes, Tensor) and hasattr(module, "qzeros") else None


def read_gptq(module: Any, dtype: torch.dtype) -> QuantizedTensor:
    """Return the weight of ``module``, a layer of GPTQ or what has its attributes. Raises CaptureError."""
    bits, (rows, columns), group = _sizes(module)
    if bits not in (4, 8):
        raise CaptureError(f"it has codes of {bits} bits, and GPTQ layers of 4 and 8 bits are read")
    per_word = module.qweight.itemsize * 8 // bits
    groups = _group_count(columns, group)
    for name, size in (("inputs", columns), ("outputs", rows)):
        if size % per_word:
            raise CaptureError(f"it has {size} {name}, and words of {per_word} codes divide those that are read")
    codes = _unpack(require_tensor("qweight", module.qweight, (columns // per_word, rows), _WORDS), bits)
    codes = codes.transpose(1, 2).reshape(columns, rows)
    zeros = require_tensor("qzeros", module.qzeros, (groups, rows // per_word), _WORDS)
    zeros = _unpack(zeros, bits).reshape(groups, rows)
    if not _stores_whole_zeros(module):
        zeros = zeros + 1
    # auto_gptq computes in the dtype of the scales, gptqmodel in that of the input.
    compute = module.scales.dtype if type(module).__module__ in _AUTO_GPTQ else dtype
    return _make(module, bits, group, codes, zeros, _group_index(module, columns, group, groups), compute)


def read_awq(module: Any, dtype: torch.dtype) -> QuantizedTensor:
    """Return the weight of ``module``, a layer of AWQ or what has its attributes. Raises CaptureError."""
    bits, (rows, columns), group = _sizes(module)
    if bits != 4:
        raise CaptureError(f"it has codes of {bits} bits, and AWQ layers of 4 bits are read")
    if rows % 8:
        raise CaptureError(f"it has {rows} outputs, and words of 8 codes divide those that are read")
    groups = _group_count(columns, group)
    order = torch.tensor(_AWQ_ORDER).argsort().to(module.qweight.device)
    codes = _unpack(require_tensor("qweight", module.qweight, (columns, rows // 8), [torch.int32]), bits)
    zeros = _unpack(require_tensor("qzeros", module.qzeros, (groups, rows // 8), [torch.int32]), bits)
    codes, zeros = codes[..., order].reshape(columns, rows), zeros[..., order].reshape(groups, rows)
    # Both libraries compute in 16 bits, and gptqmodel in those of the input where it has as many.
    follows_input = class_path(type(module)) not in _AUTO_AWQ and dtype in (torch.float16, torch.bfloat16)
    return _make(module, bits, group, codes, zeros, None, dtype if follows_input else torch.float16)


def _sizes(module: Any) -> tuple[int, tuple[int, int], int]:
    """Return the bits of a code, the weight's shape, and how many inputs share a scale."""
    if getattr(module, "adapter", None) is not None:
        raise CaptureError("it has an adapter of its library: load the model without it")
    bits = _whole_number(module, "bits", "w_bit")
    rows = _whole_number(module, "out_features", "outfeatures")
    columns = _whole_number(module, "in_features", "infeatures")
    group = _whole_number(module, "group_size", "group_size")
    return bits, (rows, columns), columns if group == -1 else group


def _whole_number(module: Any, name: str, other_name: str) -> int:
    """Return the attribute of ``module`` that has one of two names, by library."""
    value = getattr(module, name, getattr(module, other_name, None))
    if not isinstance(value, int):
        raise CaptureError(f"its {name} must be a whole number, and is {value!r}")
    return value


def _group_count(columns: int, group: int) -> int:
    if group < 1 or columns % group:
        raise CaptureError(f"its group_size={group} does not divide its {columns} inputs")
    return columns // group


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes of ``words`` (n, m) as (n, m, codes per word), int16."""
    shifts = torch.arange(0, words.itemsize * 8, bits, dtype=words.dtype, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.int16)


def _stores_whole_zeros(module: Any) -> bool:
    """Return whether zeros are stored as they are, by the second version of the format."""
    ask = getattr(module, "qzero_format", None)
    return callable(ask) and ask() == 2


def _group_index(module: Any, columns: int, group: int, groups: int) -> Tensor | None:
    """Return the group of each input, or None where groups are runs of inputs."""
    if getattr(module, "g_idx", None) is None or module.g_idx.numel() == 0:
        return None
    index = require_tensor("g_idx", module.g_idx, (columns,), [torch.int32, torch.int64]).to(torch.int32)
    if bool(((index < 0) | (index >= groups)).any()):
        raise CaptureError(
            f"its 'g_idx' must be of groups 0 to {groups - 1}, and is from {index.min()} to {index.max()}"
        )
    runs = torch.arange(columns, dtype=torch.int32, device=index.device) // group
    return None if torch.equal(index, runs) else index


def _make(
    module: Any, bits: int, group: int, codes: Tensor, zeros: Tensor, index: Tensor | None, compute: torch.dtype
) -> QuantizedTensor:
    """Return the weight of ``codes`` (in, out) and ``zeros`` (groups, out)."""
    columns, rows = codes.shape
    scales = require_tensor("scales", module.scales, (columns // group, rows), _SCALES)
    stored = {"scales": scales.t().contiguous()}
    names = {"codes": "qweight", "scales": "scales", "zeros": "qzeros", "group_index": "g_idx"}
    offset, zero_dtype = 0, ""
    if bits == 4:
        stored["codes"] = pack_nibbles(codes.t())
    else:
        stored["codes"], offset = (codes.t() - 128).to(torch.int8).contiguous(), -128
    # Symmetric weights have one zero, which needs no tensor.
    if bool((zeros == zeros[0, 0]).all()):
        offset += int(zeros[0, 0])
    else:
        zero_dtype = "uint8" if bits == 4 else "int16"
        stored["zeros"] = zeros.t().to(getattr(torch, zero_dtype)).contiguous()
    if index is not None:
        stored["group_index"] = index
    scheme = IntegerScheme(
        bits=bits,
        group_size=0 if group == columns else group,
        offset=offset,
        scale_dtype=dtype_name(scales),
        zero_dtype=zero_dtype,
        has_group_index=index is not None,
    )
    return make_weight(scheme, stored, names, (rows, columns), compute)


GPTQ = LayerReader("GPTQ layers of auto_gptq and gptqmodel with 4 or 8 bits", _find_gptq_codes, read_gptq)
AWQ = LayerReader("AWQ layers of awq (WQLinear_GEMM) and gptqmodel", _find_awq_codes, read_awq)
