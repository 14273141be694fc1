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
from adaptc.torch_modes import has_transform_or_tangent

#: the dispatch keys at which rules are registered; the general key "Autograd" is taken where an op has a backward
AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
#: names of the ops that have a rule
OPS_WITH_RULES: set[str] = set()
_LIBRARY = torch.library.Library("adaptc", "FRAGMENT")


def decompose_in_transforms(name: str, composite: Callable[..., Any], nondifferentiable: Sequence[int] = ()) -> None:
    """Let ``adaptc::name`` compute by ``composite``, with the same arguments, wherever its own derivative would be
    lost.

    ``nondifferentiable``: positions of arguments to which the op's own backward gives no gradient, and ``composite``
    does.
    """
    op = getattr(torch.ops.adaptc, name).default
    for key in AUTOGRAD_KEYS:
        kernel = torch.library.get_kernel(op, key)
        _LIBRARY.impl(name, _make_rule(kernel, composite, tuple(nondifferentiable)), key, with_keyset=True)
    register_vmap(name, composite)


def register_vmap(name: str, composite: Callable[..., Any]) -> None:
    """Let ``vmap`` of ``adaptc::name`` compute by ``composite``, for an op that handles derivatives in its own
    kernel."""

    # Not by register_vmap: its rules get values without their batch axis, and so cannot run plain under vmap.
    _LIBRARY.impl(name, composite, "FuncTorchBatched")
    OPS_WITH_RULES.add(name)


def refuse_in_transforms(name: str, advice: str) -> None:
    """Let ``adaptc::name`` raise BackendError in transforms, in forward mode, and where a gradient is wanted.

    ``advice``: what to do instead, for the message.
    """

    def refuse(*args: Any) -> NoReturn:
        raise BackendError(
            f"adaptc::{name} has no derivative, and cannot run in a transform of torch.func or in forward mode: "
            f"{advice}"
        )

    op = getattr(torch.ops.adaptc, name).default
    decompose_in_transforms(name, refuse, range(len(op._schema.arguments)))


def _make_rule(kernel: Any, composite: Callable[..., Any], nondifferentiable: tuple[int, ...]) -> Callable[..., Any]:
    def run(keyset: Any, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if has_transform_or_tangent(*tensors) or (
            nondifferentiable and torch.is_grad_enabled() and _any_requires_grad(args, nondifferentiable)
        ):
            return composite(*args)
        return kernel.call_boxed(keyset, *args)

    return run


def _any_requires_grad(args: Sequence[Any], positions: Sequence[int]) -> bool:
    """Return whether one of the tensors among ``args`` at ``positions`` requires a gradient."""
    return any(i < len(args) and isinstance(args[i], Tensor) and args[i].requires_grad for i in positions)
