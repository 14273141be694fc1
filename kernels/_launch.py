"""Helpers that every op needs around its launch: where kernels run, on which device, and checks of arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton as _wrap_triton  # pyright: ignore[reportUnknownVariableType]  # it has no types
from triton import knobs
from triton.runtime.jit import JITFunction

from adaptc.errors import BackendError

#: True where triton interprets kernels on the CPU. It decides when a kernel is defined, so for a whole process.
INTERPRETED: bool = bool(knobs.runtime.interpret)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wrap_triton(kernel: Any) -> Any:
    """Return torch's ``wrap_triton`` of ``kernel``, or an interpreted kernel itself: torch before 2.13 refuses those.

    The name must be torch's: ``triton_op`` looks for it in the source of an op to find the kernels it wraps.
    """
    return _wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def runs_kernels(x: Tensor) -> bool:
    """Return whether an op on ``x`` launches its kernel; otherwise it computes its reference."""
    return x.is_cuda or (INTERPRETED and x.device.type == "cpu")


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Run the block with the device of ``x`` as the current one: triton launches there, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.is_initialized() else nullcontext()


def scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    """Return ``scale`` as a 0-d tensor on the device of ``like``.

    As a tensor, another scale needs no wait for the GPU and no new kernel. Raises BackendError for a tensor with axes.
    """
    if isinstance(scale, Tensor):
        check("scale", scale.ndim == 0, "a number or a 0-d tensor", f"a tensor of shape {tuple(scale.shape)}")
        return scale.to(like.device)
    return like.new_full((), scale, dtype=torch.promote_types(like.dtype, torch.float32))


def check(op: str, ok: bool, expected: str, found: object) -> None:
    """Raise BackendError unless ``ok``."""
    if not ok:
        raise BackendError(f"{op}: expected {expected}, found {found}.")


def check_floats(op: str, **tensors: Tensor) -> None:
    """Raise BackendError unless every tensor is on one device and, where a kernel runs, of a type it can load."""
    first = next(iter(tensors.values()))
    for name, t in tensors.items():
        check(op, t.device == first.device, f"{name} on {first.device}, where the other tensors are", t.device)
        known = t.dtype in DTYPES if runs_kernels(t) else t.is_floating_point()
        check(op, known, f"{name} in float32, bfloat16 or float16 (convert it first)", t.dtype)
