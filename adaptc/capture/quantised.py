"""Refuse models with quantised weights that are not read, by name, before anything is captured.

A module or exported program passes where each of its weights is a plain tensor of numbers, or a quantised weight of
ours. ``quantized_layers`` makes the latter of the layers that are read. Otherwise a CaptureError names the first
quantised layer, and how to get weights that can be adapted. This file knows the libraries' classes of layers and
tensors, torch's own quantised tensors and modules, and tensors that wrap others. It also knows weights that are packed
into integers or stored in 8-bit floats. It imports none of the libraries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.errors import CaptureError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.linear_layer import class_path
from adaptc.quantized_layers.replace_layers import READ_FORMATS

#: packages whose layers and tensors hold quantised weights
_LIBRARIES = frozenset(
    {
        "aqlm",
        "auto_gptq",
        "auto_round",
        "awq",
        "bitsandbytes",
        "compressed_tensors",
        "eetq",
        "fbgemm_gpu",
        "flute",
        "fp_quant",
        "gptqmodel",
        "hqq",
        "quanto",
        "quark",
        "spqr_quant",
        "torchao",
        "vptq",
    }
)
#: submodules of ``transformers.integrations`` with layers that hold quantised weights
_INTEGRATIONS = frozenset(
    {
        "awq",
        "bitnet",
        "bitsandbytes",
        "compressed_tensors",
        "eetq",
        "fbgemm_fp8",
        "finegrained_fp8",
        "fouroversix",
        "fp_quant",
        "gemma_quant",
        "gguf",
        "higgs",
        "hqq",
        "metal_quantization",
        "mxfp4",
        "nvfp4",
        "quanto",
        "sinq",
        "spqr",
        "torchao",
        "vptq",
    }
)
#: methods whose quantised layers are all of classes above; a model without such layers is plain, whatever its config
#: says
_TOLD_BY_CLASS = frozenset({"gguf"})
#: prefixes of modules in other packages with quantised layers
_MODULE_PREFIXES = (
    "diffusers.quantizers.",
    "optimum.gptq.",
    "optimum.quanto.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.ao.nn.quantized.",
    "torch.ao.nn.sparse.quantized.",
)
#: layers of these libraries that hold plain weights
_PLAIN_LAYERS = frozenset({"bitsandbytes.nn.modules.Embedding", "bitsandbytes.nn.modules.StableEmbedding"})
#: names that only packed weights have
_PACKED_NAMES = frozenset({"qweight", "weight_packed", "packed_weight", "W_q", "weight_q"})
_ADVICE = (
    "adaptc adapts plain weights in float32, bfloat16 or float16, and reads quantised ones of these kinds: "
    f"{READ_FORMATS}. Quantise the model as one of these, dequantise it first (model.dequantize() where transformers "
    "quantised it), or load it without a quantization_config and with dtype=torch.bfloat16"
)


def check_not_quantised(model: nn.Module | ExportedProgram) -> None:
    """Raise CaptureError for a model with quantised weights of others, which ``plain_layers`` did not read."""
    name = type(model).__name__
    if isinstance(model, ExportedProgram):
        found = next(((k, w) for k, t in model.state_dict.items() if (w := _tensor_reason(t))), None)
        if found:
            raise CaptureError(f"the program is quantised: {found[0]!r} is {found[1]}. {_ADVICE}")
        return
    for path, module in model.named_modules():
        if (why := _module_reason(module)) is not None:
            raise CaptureError(f"{name} is quantised: {path!r} is a {class_path(type(module))}{why}. {_ADVICE}")
    is_read = any(isinstance(p, QuantizedTensor) for p in model.parameters())
    if (how := _declared_method(model)) and not is_read:
        raise CaptureError(f"{name} says that it is quantised ({how}). {_ADVICE}")


def _module_reason(module: nn.Module) -> str | None:
    """Return what to say of a module with quantised weights after its class name, or None for a plain module."""
    kind = type(module)
    full = class_path(kind)
    if _is_library_class(kind) and full not in _PLAIN_LAYERS:
        return ""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for name, t in tensors.items():
        if why := _tensor_reason(t):
            return f", whose {name!r} is {why}"
    packed = next((n for n in tensors if n in _PACKED_NAMES and _is_integer(tensors[n])), None)
    weight = tensors.get("weight")
    if packed is None and hasattr(module, "in_features") and (_is_8bit_integer(weight) or _is_8bit_float(weight)):
        packed = "weight"
    return None if packed is None else f", whose {packed!r} is stored as {tensors[packed].dtype}"


def _tensor_reason(t: Any) -> str | None:
    """Return what kind of quantised tensor ``t`` is, or None where it holds plain numbers."""
    if not isinstance(t, Tensor):
        return None
    kind = type(t)
    if isinstance(t, QuantizedTensor):
        return None
    if t.is_quantized:
        return f"a quantised tensor ({t.dtype})"
    # A DTensor wraps plain numbers, of which each process holds a shard.
    wraps = hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.distributed.")
    return f"a {class_path(kind)}" if wraps or _is_library_class(kind) else None


def _is_library_class(kind: type) -> bool:
    where = kind.__module__
    integration = where.removeprefix("transformers.integrations.").partition(".")[0]
    known = where.partition(".")[0] in _LIBRARIES or f"{where}.".startswith(_MODULE_PREFIXES)
    return known or (where.startswith("transformers.integrations.") and integration in _INTEGRATIONS)


def _is_integer(t: Any) -> bool:
    return isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex())


def _is_8bit_integer(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype in (torch.uint8, torch.int8)


def _is_8bit_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.itemsize == 1


def _declared_method(model: nn.Module) -> str | None:
    """Return the quantisation method that a transformers model names, or None where its weights were made plain on
    loading."""
    quantiser = vars(model).get("hf_quantizer")
    config = getattr(quantiser, "quantization_config", None)
    if quantiser is None or vars(model).get("is_quantized") is not True:
        return None
    if getattr(config, "dequantize", False) is True or getattr(config, "run_compressed", True) is False:
        return None
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method) or type(quantiser).__name__)
    return None if name in _TOLD_BY_CLASS else name
