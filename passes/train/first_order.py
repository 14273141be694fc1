"""Refuse second derivatives of steps with a backward of their own, and tell where plain ops must run instead.

The derivative of such a step's gradient is an error that names the way out. Torch's ``once_differentiable`` does not
serve. It takes the gradient for a constant where the gradient that comes in is one, as in the Hessian of a sum. Then a
part of the derivative is lost without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.torch_modes import has_transform_or_tangent


def needs_plain_ops(*tensors: Tensor | None) -> bool:
    """Return whether a transform of ``torch.func`` or a forward-mode derivative follows these tensors.

    A backward of our own does not support them. Under a compiler this is False, since it handles such cases itself.
    """
    return not torch.compiler.is_compiling() and has_transform_or_tangent(*tensors)


def first_order_only(step_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward of a step called ``what``.

    The backward then runs without recording. Its results raise AdaptcError when they are differentiated.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                out = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return out
            # The results depend on all that they were made from, so that a derivative by any of it reaches the error.
            ties = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
            at = [i for i, t in enumerate(out) if isinstance(t, Tensor)]
            step: Any = _RaisingBackward  # torch gives apply no types
            new = list(step.apply(step_name, [out[i] for i in at], torch.ones((), requires_grad=True), *ties))
            return tuple(new.pop(0) if isinstance(t, Tensor) else t for t in out)

        return run

    return decorate


class _RaisingBackward(torch.autograd.Function):
    """The identity on ``grads``, with a backward that raises.

    Its results depend on ``ties``, of which at least one requires grad.
    """

    @staticmethod
    def forward(ctx: Any, what: str, grads: Sequence[Tensor], *ties: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(g.detach() for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise AdaptcError(
            f"{ctx.what} is one step of this module, with gradients of first order alone: set prog.fuse = False, and "
            "make the module anew, for gradients of gradients; torch.func.hessian and its like need no other module"
        )
