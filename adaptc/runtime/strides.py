"""Bring tensors into the memory layout that compiled code was made for.

A tensor may have any strides: it may be transposed, expanded or a slice. It is copied only where it does not have the
layout already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError


def order_of(value: Tensor) -> tuple[int, ...]:
    """Return the axes of a tensor from the outermost to the innermost in memory.

    They are in their own order where the tensor has gaps, or where a size is not known. Symbolic sizes and strides
    count with the values of the example inputs.
    """
    shape, stride = ([_number(n) for n in sizes] for sizes in (value.shape, value.stride()))
    plain = _plain(len(shape))
    if any(n is None for n in (*shape, *stride)) or _is_dense(shape, stride, plain):
        return plain
    order = tuple(sorted(plain, key=lambda i: (-stride[i], -shape[i], i)))
    return order if _is_dense(shape, stride, order) else plain


def _number(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint


def _is_dense(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    step = 1
    for i in reversed(order):
        if shape[i] != 1 and stride[i] != step:
            return False
        step *= max(shape[i], 1)
    return True


def empty_in(order: Sequence[int], shape: Sequence[Any], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of ``shape`` with its axes in memory in ``order``.

    It has the dtype and device of ``like``.
    """
    made = torch.empty([shape[i] for i in order], dtype=like.dtype, device=like.device)
    return made.permute(_back(order))


def laid(value: Tensor, order: Sequence[int]) -> Tensor:
    """Return ``value`` with its axes in memory in ``order``, dense: itself where it lies so already, else a copy."""
    turned = value.permute(tuple(order))
    return value if turned.is_contiguous() else turned.contiguous().permute(_back(order))


def write_back(given: Tensor, taken: Tensor, name: str) -> None:
    """Copy what a program wrote to ``taken``, a copy of its input, to the tensor ``given`` as that input.

    Raises AdaptcError where elements of ``given`` share memory, as those of an expanded tensor do.
    """
    try:
        with torch.no_grad():
            given.copy_(taken)
    except RuntimeError as error:
        raise AdaptcError(
            f"the program writes to its input {name}, and elements of the tensor it was given share memory (it was "
            "expanded): give it a tensor of its own, tensor.contiguous()"
        ) from error


def _back(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


@cache
def _plain(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim))
