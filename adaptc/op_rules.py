"""Give ops of adaptc rules for transforms of ``torch.func`` and forward-mode derivatives.

Such an op is registered with torch, with a kernel and maybe a backward. Under ``grad``, ``jvp`` and ``vmap``, and where
a tensor has a tangent, a rule makes it compute by plain operators, which torch can differentiate. Another kind of rule
raises an error that names the op. Everywhere else the op runs its own kernel.

Without a rule torch takes an op for a constant, and derivatives are silently zero. Every op under ``adaptc::`` has a
rule: ``tests/kernels/test_op_rules.py`` checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptc.errors import BackendError
from adaptc.torch_modes import followed

#: the dispatch keys at which rules are registered; the general key "Autograd" is taken where an op has a backward
KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
#: names of the ops that have a rule
RULES: set[str] = set()
_LIBRARY = torch.library.Library("adaptc", "FRAGMENT")


def plain_in_transforms(name: str, plain: Callable[..., Any], constant: Sequence[int] = ()) -> None:
    """Let ``adaptc::name`` compute by ``plain``, with the same arguments, wherever its own derivative would be lost.

    ``constant``: positions of arguments to which the op's own backward gives no gradient, and ``plain`` does.
    """
    op = getattr(torch.ops.adaptc, name).default
    for key in KEYS:
        own = torch.library.get_kernel(op, key)
        _LIBRARY.impl(name, _rule(own, plain, tuple(constant)), key, with_keyset=True)
    batched_by(name, plain)


def batched_by(name: str, plain: Callable[..., Any]) -> None:
    """Let ``vmap`` of ``adaptc::name`` compute by ``plain``, for an op that handles derivatives in its own kernel."""

    # Not by register_vmap: its rules get values without their batch axis, and so cannot run plain under vmap.
    _LIBRARY.impl(name, plain, "FuncTorchBatched")
    RULES.add(name)


def refused_in_transforms(name: str, way: str) -> None:
    """Let ``adaptc::name`` raise BackendError in transforms, in forward mode, and where a gradient is wanted.

    ``way``: what to do instead, for the message.
    """

    def refuse(*args: Any) -> NoReturn:
        raise BackendError(
            f"adaptc::{name} has no derivative, and cannot run in a transform of torch.func or in forward mode: {way}"
        )

    op = getattr(torch.ops.adaptc, name).default
    plain_in_transforms(name, refuse, range(len(op._schema.arguments)))


def _rule(own: Any, plain: Callable[..., Any], constant: tuple[int, ...]) -> Callable[..., Any]:
    def run(keyset: Any, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if followed(*tensors) or (constant and torch.is_grad_enabled() and _wanted(args, constant)):
            return plain(*args)
        return own.call_boxed(keyset, *args)

    return run


def _wanted(args: Sequence[Any], places: Sequence[int]) -> bool:
    """Return whether one of the tensors among ``args`` at ``places`` requires a gradient."""
    return any(i < len(args) and isinstance(args[i], Tensor) and args[i].requires_grad for i in places)
