"""Typed ways to what torch, or a value that may be anything, leaves without a type.

Strict type checking reports each use of such a value. Here each has one function that says what torch's documentation
promises. Nothing is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

#: ``torch.library``, whose functions have types of arguments that nothing is known of
untyped_library: Any = torch.library


class CustomOp(Protocol[P, R_co]):
    """An op of ours, which is called like the function that it was made of."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def register_fake(self, fake: Callable[P, Any], /) -> Callable[P, Any]:
        """Register what the op gives for tensors without values."""
        ...

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None]) -> None:
        """Register the gradient."""
        ...


class _OpDecorator(Protocol):
    def __call__(self, name: str, *, mutates_args: Collection[str]) -> Callable[[Callable[P, R]], CustomOp[P, R]]: ...


#: ``torch.library.custom_op`` and ``triton_op``, which return an op that has the types of the function
custom_op: _OpDecorator = untyped_library.custom_op
triton_op: _OpDecorator = untyped_library.triton_op


def is_list_or_tuple(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Return whether ``value`` is a list or a tuple; ``isinstance`` leaves the type of the entries unknown."""
    return isinstance(value, (list, tuple))


def is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    """Return whether ``value`` is a dict; ``isinstance`` leaves the types of keys and values unknown."""
    return isinstance(value, dict)


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Return whether ``value`` is a mapping; ``isinstance`` leaves the types of keys and values unknown."""
    return isinstance(value, Mapping)


def is_path(value: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether ``value`` is a path; ``isinstance`` leaves open whether it is one of text or of bytes."""
    return isinstance(value, (str, os.PathLike))


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, as ``vars`` does, which leaves their type unknown."""
    return vars(value)


def shape_of(tensor: Tensor) -> Sequence[int | torch.SymInt]:
    """Return the sizes of a tensor, which are symbolic where a program's inputs have free sizes; torch says int."""
    return tensor.shape


def symbolic_expression(size: torch.SymInt) -> Any:
    """Return the sympy expression of a symbolic size, over the symbols of its shape environment."""
    node: Any = size.node
    return node.expr


def to_python(tensor: Tensor) -> Any:
    """Return the values of a tensor as ``tolist`` does: nested lists, or one number for a tensor without axes."""
    untyped: Any = tensor
    return untyped.tolist()


def vector_norm(tensor: Tensor, order: float = 2, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Return the norms of vectors along ``dim``, or that of all entries, as ``torch.linalg.vector_norm`` does."""
    linalg: Any = torch.linalg
    return linalg.vector_norm(tensor, order, dim=dim, keepdim=keepdim)


def reduced_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (rows, n), S (n,) and Vh (n, columns) with n the smaller side, as ``torch.linalg.svd`` does."""
    linalg: Any = torch.linalg
    return linalg.svd(matrix, full_matrices=False)


def block_diag(*tensors: Tensor) -> Tensor:
    """Return a matrix that has these matrices along its diagonal, as ``torch.block_diag`` does."""
    untyped: Any = torch
    return untyped.block_diag(*tensors)


def fork_rng(devices: Iterable[int] | None = None) -> AbstractContextManager[None]:
    """Run the block with random numbers of its own on the CPU and these GPUs; None stands for all GPUs."""
    random: Any = torch.random
    return random.fork_rng(devices)


def manual_seed(seed: int) -> None:
    """Seed the random numbers of the CPU and of all GPUs."""
    untyped: Any = torch
    untyped.manual_seed(seed)


def named_modules(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths of a module and of all modules inside it, with the modules."""
    untyped: Any = module
    return untyped.named_modules(remove_duplicate=remove_duplicate)
