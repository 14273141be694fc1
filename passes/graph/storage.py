"""Identify the memory of a tensor, by which weights are known, whatever their names and objects.

A tensor without memory of its own (a quantised weight) has an attribute ``memory_tensor``, the tensor to ask instead.

Private torch use: none. ``data_ptr`` is public. A meta or an empty tensor has none, which is why the cases differ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def storage_key(t: Tensor) -> Any:
    """Return a key that is equal for two tensors that are the same weight under two names."""
    t = getattr(t, "memory_tensor", t)
    if t.device.type == "meta" or t.numel() == 0:
        return id(t)
    return (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)


def memory_address(t: Tensor) -> int:
    """Return the address of the memory that a tensor and all its views lie in."""
    return getattr(t, "memory_tensor", t).untyped_storage().data_ptr()
