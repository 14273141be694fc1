"""Read quantised layers as the files of a transformers model hold them, without the libraries that wrote them.

A config's ``quantization_config`` names the library. For a layer X with a weight the files have these keys:

    bitsandbytes, 4 bits   X.weight (codes), X.weight.absmax, .quant_map and .quant_state.bitsandbytes__<type>, which is
                           JSON as bytes; with double quantisation .nested_absmax and .nested_quant_map, too
    bitsandbytes, 8 bits   X.weight (codes), X.SCB, X.weight_format
    gptq, awq              X.qweight, X.qzeros, X.scales, X.g_idx

Weights of bitsandbytes share the memory of the tensors that they are read from, and can be written in the same keys.
The words of the other two are rewritten, as ``packed_words`` does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CaptureError, CheckpointError, short_repr
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.table_scheme import TABLES, TableScheme
from adaptc.quantized_layers.bitsandbytes_layers import STEP_8BIT
from adaptc.quantized_layers.linear_layer import make_weight, require_tensor
from adaptc.quantized_layers.packed_words import read_awq, read_gptq

#: what is read, for messages
READ_METHODS = ("bitsandbytes", "gptq", "awq")
_STATE = ".quant_state.bitsandbytes__"
_ROLES_4BIT = {
    "codes": "",
    "table": ".quant_map",
    "scales": ".absmax",
    "scale_table": ".nested_quant_map",
    "super_scales": ".nested_absmax",
}
#: bytes of JSON that a weight's state may take beyond what it took, for an offset with more digits
_STATE_ROOM = 32


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight in files.

    Attributes:
        name: the name of the weight, which need not be a key.
        keys: the keys that hold it.
        shape: its shape, (outputs, inputs).
        read: returns the weight. Raises CheckpointError where its tensors do not belong together.
        write: takes a weight of the same scheme and returns the tensors of all keys; None where none are written.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    read: Callable[[], QuantizedTensor]
    write: Callable[[QuantizedTensor], dict[str, Tensor]] | None


def find_stored_weights(
    config: Any, keys: Collection[str], get: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, StoredWeight]:
    """Return the quantised weights by name, of files with ``keys`` whose tensors ``get`` reads.

    ``config`` is the ``quantization_config``, and ``dtype`` that of the model.

    Raises CheckpointError for a method that is not read, and for tensors that do not belong together.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method not in READ_METHODS:
        raise CheckpointError(
            f"the model is quantised by {short_repr(method)}, and files of {', '.join(READ_METHODS)} are read: load it "
            "with its library, and merge a program of it"
        )
    found: dict[str, StoredWeight] = {}
    for key in keys:
        make = _reader_of(method, key)
        if make is None:
            continue
        name, read = make
        with _errors_of(name):
            weight = read(name, config, keys, get, dtype)
            found[name] = replace(weight, read=partial(_read, weight))
    return found


def _read(weight: StoredWeight) -> QuantizedTensor:
    with _errors_of(weight.name):
        return weight.read()


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Run the block with errors that name the weight."""
    try:
        yield
    except CaptureError as error:
        raise CheckpointError(f"the quantised weight {name!r} cannot be read: {error}") from error


def _reader_of(method: str, key: str) -> tuple[str, Callable[..., StoredWeight]] | None:
    """Return the name of the weight that ``key`` shows, and what reads it; each weight has one such key."""
    if method != "bitsandbytes":
        return (f"{key.removesuffix('qweight')}weight", _packed) if key.endswith(".qweight") else None
    name, mark, _ = key.partition(_STATE)
    if mark:
        return name, partial(_four_bit, state_key=key)
    return (f"{key.removesuffix('SCB')}weight", _eight_bit) if key.endswith(".SCB") else None


def _four_bit(
    name: str, config: object, keys: Collection[str], get: Callable[[str], Tensor], _: torch.dtype, state_key: str
) -> StoredWeight:
    state = _parse_state(get(state_key))
    try:
        shape = tuple(int(n) for n in state["shape"])
        dtype = getattr(torch, str(state["dtype"]))
        nested = int(state.get("nested_blocksize", 0))
        scheme = TableScheme(state["quant_type"], int(state["blocksize"]), nested)
        offset = torch.tensor(float(state["nested_offset"])) if nested else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CaptureError(f"its state {short_repr(state)} says no scheme ({short_repr(str(error))})") from error
    if len(shape) != 2 or state["quant_type"] not in TABLES or not isinstance(dtype, torch.dtype):
        raise CaptureError(f"its state is of a weight {shape} of {dtype}, and weights (outputs, inputs) are read")
    roles = {r: f"{name}{suffix}" for r, suffix in _ROLES_4BIT.items() if nested or not r.startswith(("scale_", "su"))}
    if missing := [k for k in roles.values() if k not in keys]:
        raise CaptureError(f"its {missing[0]!r} is not in the files")

    def read() -> QuantizedTensor:
        stored = {role: get(key) for role, key in roles.items()}
        require_tensor(name, stored["codes"], (-(-prod(shape) // 2), 1), [torch.uint8])
        stored["codes"] = stored["codes"].reshape(-1)
        if offset is not None:
            stored["scale_offset"] = offset
        return make_weight(scheme, stored, {**roles, "scale_offset": state_key}, shape, dtype)

    def write(weight: QuantizedTensor) -> dict[str, Tensor]:
        written = {key: weight.stored[role] for role, key in roles.items()}
        written[name] = written[name].reshape(-1, 1)
        new = dict(state)
        if nested:
            new["nested_offset"] = float(weight.stored["scale_offset"])
        text = json.dumps(new).encode().ljust(len(get(state_key)) + _STATE_ROOM)
        written[state_key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return written

    return StoredWeight(name, (*roles.values(), state_key), (shape[0], shape[1]), read, write)


def _parse_state(t: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(t.tolist()))
    except (ValueError, TypeError) as error:
        raise CaptureError("its state is no JSON") from error
    if not isinstance(state, dict):
        raise CaptureError(f"its state is {short_repr(state)}, and must be an object")
    return state


def _eight_bit(
    name: str, config: object, keys: Collection[str], get: Callable[[str], Tensor], dtype: torch.dtype
) -> StoredWeight:
    scales_key, format_key = f"{name.removesuffix('weight')}SCB", f"{name}_format"
    if name not in keys:
        raise CaptureError(f"its {name!r} is not in the files")
    if format_key in keys and int(get(format_key)) != 0:
        raise CaptureError(f"its {format_key!r} is {int(get(format_key))}, and codes that lie row by row (0) are read")
    shape = tuple(get(name).shape)
    if len(shape) != 2:
        raise CaptureError(f"its {name!r} is {shape}, and weights (outputs, inputs) are read")

    def read() -> QuantizedTensor:
        scales = require_tensor(scales_key, get(scales_key), (shape[0],), [torch.float32])
        stored = {"codes": get(name), "scales": scales.reshape(-1, 1)}
        names = {"codes": name, "scales": scales_key}
        return make_weight(IntegerScheme(step=STEP_8BIT), stored, names, shape, dtype)

    def write(weight: QuantizedTensor) -> dict[str, Tensor]:
        written = {name: weight.stored["codes"], scales_key: weight.stored["scales"].reshape(-1)}
        return written | ({format_key: get(format_key)} if format_key in keys else {})

    held = tuple(k for k in (name, scales_key, format_key) if k in keys)
    return StoredWeight(name, held, (shape[0], shape[1]), read, write)


class _PackedLayer:
    """The tensors of a layer of GPTQ or AWQ, with the attributes that layers of their libraries have."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: Any) -> None:
        self.bits, self.group_size = bits, config.get("group_size", config.get("q_group_size"))
        self.qweight, self.qzeros, self.scales = (tensors[n] for n in ("qweight", "qzeros", "scales"))
        self.g_idx = tensors.get("g_idx")
        self.is_second_version = config.get("checkpoint_format") == "gptq_v2"
        self.out_features = int(self.scales.shape[-1])
        packed_inputs = config["quant_method"] == "gptq"
        self.in_features = int(self.qweight.shape[0]) * (32 // bits if packed_inputs else 1)

    def qzero_format(self) -> int:
        return 2 if self.is_second_version else 1


def _packed(
    name: str, config: Mapping[str, Any], keys: Collection[str], get: Callable[[str], Tensor], dtype: torch.dtype
) -> StoredWeight:
    layer = name.removesuffix("weight")
    tensors = {n: get(f"{layer}{n}") for n in ("qweight", "qzeros", "scales", "g_idx") if f"{layer}{n}" in keys}
    if missing := [n for n in ("qzeros", "scales") if n not in tensors]:
        raise CaptureError(f"its {layer + missing[0]!r} is not in the files")
    bits = config.get("bits", config.get("w_bit"))
    if bits not in (4, 8):
        raise CaptureError(f"its codes have {short_repr(bits)} bits, and those of 4 and 8 are read")
    if config["quant_method"] == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        raise CaptureError(f"its version is {short_repr(config['version'])}, and 'gemm' is read")
    if tensors["qweight"].ndim != 2 or tensors["scales"].ndim != 2:
        raise CaptureError("its 'qweight' and 'scales' must have two axes")
    made, reader = _PackedLayer(config, tensors, bits), read_gptq if config["quant_method"] == "gptq" else read_awq
    shape = made.out_features, made.in_features
    return StoredWeight(name, tuple(f"{layer}{n}" for n in tensors), shape, lambda: reader(made, dtype), None)
