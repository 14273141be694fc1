"""Backwards that cannot be differentiated again, which say so, and where plain operators have to compute instead.

Before: a step of a training graph with a backward of its own. After: a derivative of its gradient is an error that
names the way out, whatever it goes through. Torch's own ``once_differentiable`` takes the gradient for a constant where
what comes from the loss is one, as in a Hessian of a sum, and a part of the derivative is lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.torch_modes import followed


def plain_only(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative follows these, of which a backward of our own
    knows nothing. A compiler looks for itself."""
    return not torch.compiler.is_compiling() and followed(*tensors)


def first_order(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward of a step called ``what``: it runs without recording, and its results raise AdaptcError
    when they are differentiated."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                out = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return out
            # What it was made of, so that a derivative by any of that comes by.
            ties = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
            at = [i for i, t in enumerate(out) if isinstance(t, Tensor)]
            new = list(_Refused.apply(what, [out[i] for i in at], torch.ones((), requires_grad=True), *ties))
            return tuple(new.pop(0) if isinstance(t, Tensor) else t for t in out)

        return run

    return decorate


class _Refused(torch.autograd.Function):
    """``grads`` as they are, with a backward that raises; they depend on ``ties``, one of which requires grad."""

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
