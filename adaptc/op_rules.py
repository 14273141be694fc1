"""What transforms of ``torch.func`` and forward-mode derivatives make of ops of adaptc.

Before: an op that torch knows, with a kernel and maybe a backward. After: under ``grad``, ``jvp``, ``vmap`` and what is
made of them, and where a tensor has a tangent, it computes by plain operators, which torch can follow; or it raises an
error that names it. Otherwise it is what it was. Without such a rule torch takes an op for a constant, and derivatives
are zero without a word. Every op under ``adaptc::`` has one: ``tests/kernels/test_op_rules.py`` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptc.errors import BackendError
from adaptc.torch_modes import followed

#: the keys of kernels that look for derivatives; "Autograd", which stands for all, is taken where an op has a backward
KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
#: names of the ops that have a rule
RULES: set[str] = set()
_LIBRARY = torch.library.Library("adaptc", "FRAGMENT")


def plain_in_transforms(name: str, plain: Callable[..., Any], constant: Sequence[int] = ()) -> None:
    """Let ``adaptc::name`` compute by ``plain``, of the same arguments, wherever its own derivative would be lost.

    ``constant``: positions of arguments that the op's own backward takes for constants, and ``plain`` does not.
    """
    op = getattr(torch.ops.adaptc, name).default
    for key in KEYS:
        own = torch.library.get_kernel(op, key)
        _LIBRARY.impl(name, _rule(own, plain, tuple(constant)), key, with_keyset=True)
    batched_by(name, plain)


def batched_by(name: str, plain: Callable[..., Any]) -> None:
    """Let ``vmap`` of ``adaptc::name`` be that of ``plain``: of an op whose kernel looks for derivatives itself."""

    # Not by ``register_vmap``, whose rules are given values without their batch and cannot call vmap again.
    _LIBRARY.impl(name, plain, "FuncTorchBatched")
    RULES.add(name)


def refused_in_transforms(name: str, way: str) -> None:
    """Let ``adaptc::name`` raise BackendError there, and where a gradient is wanted; ``way``: what to do instead."""

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
    """Whether the gradient of one of these arguments is."""
    return any(i < len(args) and isinstance(args[i], Tensor) and args[i].requires_grad for i in places)
