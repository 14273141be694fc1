"""Helpers that every op needs around its launch: where kernels run, on which device, and checks of arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
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


def is_empty_grid(*sizes: Any) -> bool:
    """Return whether a grid over these sizes has no program, which a GPU refuses. Symbolic sizes count as positive."""
    return any(statically_known_true(size == 0) for size in sizes)


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


class BoundKernel:
    """A kernel compiled for the types and options of its first launch, which later launches must share.

    A launch by Triton finds out types, alignments and options anew, which takes longer than a small kernel runs. A call
    ``bound[grid](*arguments, **options)`` only passes other tensors and numbers on.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: Any = None
        self._constants: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        if self._compiled is None:
            return lambda *arguments, **options: self.compile(*arguments, **options)[grid](*arguments, **options)
        return lambda *arguments, **options: self._compiled[grid](*arguments, *self._constants)

    def compile(self, *arguments: Any, **options: Any) -> BoundKernel:
        """Compile the kernel for such arguments, or find that it is, and return this object. Nothing is launched."""
        # All kernels have their constants last, and launches name each of them.
        self._constants = tuple(options[p.name] for p in self._kernel.params if p.is_constexpr)
        # Fused multiply-adds are the default of Triton; saying so silences a warning that the default may change.
        options = {"enable_fp_fusion": True, **options}
        self._compiled = self._kernel.warmup(*arguments, grid=(1, 1, 1), **options)
        return self


class BoundKernels:
    """The bound kernels of layers that share types and sizes: call it with a kernel."""

    def __init__(self) -> None:
        self._bound: dict[int, BoundKernel] = {}

    def __call__(self, kernel: Any) -> BoundKernel:
        # A kernel's own hash is that of its source, which takes longer.
        return self._bound.get(id(kernel)) or self._bound.setdefault(id(kernel), BoundKernel(kernel))

    def without_launches(self, kernel: Any) -> Any:
        """Return what is used as a bound kernel, and only compiles it."""
        return _Compilation(self(kernel))


class _Compilation:
    def __init__(self, bound: BoundKernel) -> None:
        self._bound = bound

    def __getitem__(self, grid: Any) -> Callable[..., BoundKernel]:
        return self._bound.compile
