"""Which memory a tensor is: weights are known by it, whatever names and objects they have.

Private torch use: none. ``data_ptr`` is public; that a meta or an empty tensor has none is what the cases are about.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def storage_key(t: Tensor) -> Any:
    """Equal for two tensors that are the same weight under two names."""
    if t.device.type == "meta" or t.numel() == 0:
        return id(t)
    return (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)


def memory_of(t: Tensor) -> int:
    """Where the memory begins that a tensor, and every view of it, lies in."""
    return t.untyped_storage().data_ptr()
