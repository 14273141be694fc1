"""Detect and switch off a thread's modes: transforms of ``torch.func``, torch modes, autocast, inference mode.

Tensors that are kept beyond a call are made in :func:`outside_modes`, so that they do not depend on the caller's modes.
:func:`has_transform_or_tangent` and :func:`is_wrapped_or_dual` tell where an op without derivatives, or compiled code,
must not run.

Private torch use, with the public route that was tried:
- ``torch._C._functorch.maybe_current_level`` and ``is_functorch_wrapped_tensor``: they tell whether a transform of
  ``torch.func`` is on, and whether it has wrapped a tensor. Public: none; no attribute of a tensor shows it.
- ``torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack``: it hides computation from transforms. Public:
  another thread has no transforms, but it would wait for ever for the locks that the caller holds.
- ``torch.utils._python_dispatch._disable_current_modes`` and ``torch._C._len_torch_dispatch_stack``: they hide
  computation from dispatch modes. Public: no route leaves a mode that other code has entered.
- ``torch.overrides._pop_mode_temporarily`` and ``_get_current_function_mode_stack``: they hide computation from
  function modes, such as ``torch.device``. Public: ``torch._C.DisableTorchFunction`` turns off an export's own, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

#: device types whose autocast :func:`outside_modes` switches off
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` is on."""
    return maybe_current_level() is not None


def is_wrapped_or_dual(value: Any) -> bool:
    """Return whether ``value`` is a tensor that a transform of ``torch.func`` has wrapped, or that has a tangent."""
    return isinstance(value, Tensor) and (is_functorch_wrapped_tensor(value) or has_tangent(value))


def in_dispatch_mode() -> bool:
    """Return whether a dispatch mode is on, such as those of tracing and of fake tensors."""
    return bool(_len_torch_dispatch_stack())


def may_be_traced() -> bool:
    """Return whether a trace may be recording: what is read from a tensor would stay in it as a constant."""
    jit: Any = torch.jit  # its types leave the function out
    return in_dispatch_mode() or jit.is_tracing()


def has_transform_or_tangent(*values: Any) -> bool:
    """Return whether a derivative is taken other than by backward: a transform is on, or a tensor has a tangent."""
    return in_transform() or any(isinstance(v, Tensor) and has_tangent(v) for v in values)


def has_tangent(t: Tensor) -> bool:
    """Return whether a tensor has a tangent, so that a forward-mode derivative is taken."""
    return forward_ad.unpack_dual(t).tangent is not None


def outside_transforms() -> AbstractContextManager[Any]:
    """Run the block with no transform of ``torch.func`` on, for code that has no rule for transforms."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()


def enters_autocast(graph: fx.Graph) -> bool:
    """Return whether one node of ``graph`` enters autocast and another leaves it, as torch captures blocks with
    branches."""
    return any(getattr(n.target, "__name__", "") == "_enter_autocast" for n in graph.nodes)


@contextmanager
def leaving_autocast() -> Iterator[None]:
    """Run the block, and where it fails leave the autocast that it has entered.

    A graph of :func:`enters_autocast` that fails in between would leave it on for all that the thread computes later.
    """
    depth = _autocast_depth()
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in AUTOCAST_DEVICES]
    try:
        yield
    except BaseException:
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        for device, was_enabled, dtype in before:
            torch.set_autocast_enabled(device, was_enabled)
            torch.set_autocast_dtype(device, dtype)
        if not depth:
            torch.clear_autocast_cache()
        raise


def _autocast_depth() -> int:
    """Return how many blocks of autocast the thread is in."""
    inside = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return inside - 1


@contextmanager
def outside_modes() -> Iterator[None]:
    """Run the block with no transform, mode, autocast or inference mode on, so that its tensors may be kept.

    Gradients stay on or off as they were; they are off where inference mode was on.
    """
    with ExitStack() as stack:
        stack.enter_context(outside_transforms())
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        if _len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes a matmul with x; None where it is off, or leaves x as it is."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
