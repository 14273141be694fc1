"""Check the tensors that a caller gives, before anything relies on them.

Each key has one plain dense tensor whose values are in memory. Otherwise a CheckpointError names the key and what was
found there. Values are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptc.adapter_files.format import bare_key
from adaptc.errors import CheckpointError
from adaptc.torch_modes import is_wrapped_or_dual
from adaptc.torch_typing import is_mapping

_EXPECTED = "expected a dense torch.Tensor that holds its values"


def is_state_dict(value: Any) -> bool:
    """Return whether ``value`` is a non-empty mapping of tensors."""
    return is_mapping(value) and bool(value) and all(isinstance(t, Tensor) for t in value.values())


def check_state_dict(tensors: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """Return ``tensors`` as a dict. Raises CheckpointError for a key that is no name, and for a value that cannot be
    bound."""
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{source}: key {key!r} is a {type(key).__name__}; keys are the names PEFT gives")
        if fault := _describe_problem(value):
            raise CheckpointError(f"{source}: {key!r} is {fault}; {_EXPECTED}")
    return dict(tensors)


def bare_tensors(tensors: Mapping[str, Tensor], source: str, peft_type: str) -> dict[str, Tensor]:
    """Return ``tensors`` with bare keys. A key without a prefix counts as bare.

    Raises CheckpointError for two spellings of one key.
    """
    out = {bare_key(key, peft_type) or key: value for key, value in tensors.items()}
    if len(out) == len(tensors):
        return out
    spellings: dict[str, str] = {}
    for key in tensors:
        other = spellings.setdefault(bare_key(key, peft_type) or key, key)
        if other != key:
            raise CheckpointError(
                f"{source}: {other!r} and {key!r} are two spellings of one key, and which tensor is meant is not "
                "known; drop one of them"
            )
    raise AssertionError("two keys have one bare form")


def _describe_problem(value: Any) -> str:
    """Return what keeps a value from being bound as a tensor, or '' for one that can be bound."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        return {"NoneType": "None", "ndarray": "a NumPy array (torch.from_numpy makes a tensor of it)"}.get(
            kind, f"a {kind}"
        )
    if type(value) not in (Tensor, Parameter):
        return f"a {type(value).__name__}, whose values only its own class knows; give it as a plain tensor"
    if is_wrapped_or_dual(value):
        return (
            "a tensor that a transform of torch.func, or a forward-mode derivative, follows and that ends with it "
            "(torch.func.functional_call(prog.module(), parameters, inputs) is a call by such tensors)"
        )
    if value.is_meta:
        return "a tensor on the device meta, which has no values"
    if value.is_quantized:
        return f"quantised ({value.dtype}); dequantize() gives its values"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}; to_dense() gives its values"
    reach = value.numel()
    if not value.is_contiguous():  # strided tensors reach farther than their elements, expanded ones less far
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    if (value.storage_offset() + reach) * value.itemsize > value.untyped_storage().nbytes():
        return "a tensor whose memory was given up"
    return ""
