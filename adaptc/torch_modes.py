"""What a thread has on in torch while it calls: transforms of ``torch.func``, modes, autocast, inference mode.

Before: a call, under whatever its caller has on. After: :func:`plainly` is where tensors are made that are kept, which
are what they would be with nothing on; and :func:`followed` and :func:`transformed` say what an op without derivatives,
or compiled code, must not be given.

Private torch use, with the public route that was tried:
- ``torch._C._functorch.maybe_current_level`` and ``is_functorch_wrapped_tensor``: whether a transform of ``torch.func``
  is on, and whether a tensor is one of its own. Public: none; it shows in no attribute of a tensor.
- ``torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack``: what a transform does not see. Public: another
  thread, which has nothing on, and which waits for ever for the locks that the caller holds.
- ``torch.utils._python_dispatch._disable_current_modes`` and ``torch._C._len_torch_dispatch_stack``: the same for
  dispatch modes. Public: none leaves a mode that somebody else has entered.
- ``torch.overrides._pop_mode_temporarily`` and ``_get_current_function_mode_stack``: the same for function modes, of
  which ``torch.device`` is one. Public: ``torch._C.DisableTorchFunction`` turns off those that an export enters, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

#: device types whose autocast a caller may have on
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is on."""
    return maybe_current_level() is not None


def transformed(value: Any) -> bool:
    """Whether a transform of ``torch.func``, or a forward-mode derivative, follows this tensor."""
    return isinstance(value, Tensor) and (is_functorch_wrapped_tensor(value) or _has_tangent(value))


def followed(*values: Any) -> bool:
    """Whether a derivative without a backward is taken: a transform is on, or a tensor has a tangent."""
    return in_transform() or any(isinstance(v, Tensor) and _has_tangent(v) for v in values)


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def outside_transforms() -> AbstractContextManager[Any]:
    """Compute where no transform of ``torch.func`` is on, for code that cannot be followed by one."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()


@contextmanager
def plainly() -> Iterator[None]:
    """Compute as a thread with nothing on: what is made here may be kept. Gradients stay on or off, and are off where
    inference mode was on."""
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
