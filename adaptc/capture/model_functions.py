"""Replace functions of a model's own code while the model is traced.

A replacement is for the tracing thread alone. Other threads, which may run the model meanwhile, get the function as
before. Whether a replacement gives the same as the function can be tried on inputs drawn at random.

Private use of the distribution ``kernels``, with the public route that was tried: the closure of the modules that
stand for functions, which has the function. Public: ``inspect.unwrap``, and such a module says not what it wraps.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]


@contextlib.contextmanager
def replaced_functions(model: nn.Module, makers: Mapping[str, Callable[[Function], Function | None]]) -> Iterator[None]:
    """Run the block with other functions in place of some in ``model``'s classes and in the modules that define these.

    ``makers`` maps the name of a function to what makes the replacement for a function of this name, or None for none.
    """
    thread = threading.get_ident()
    classes = {c for m in model.modules() for c in type(m).__mro__}
    owners = [*classes, *(sys.modules[n] for n in {c.__module__ for c in classes} if n in sys.modules)]

    def for_thread(original: Function, made: Function) -> Function:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return (made if threading.get_ident() == thread else original)(*args, **kwargs)

        return function

    with contextlib.ExitStack() as stack:
        for owner in owners:
            for name, make in makers.items():
                found = vars(owner).get(name)
                original = _function_of(found)
                if original is not None and (made := make(original)) is not None:
                    stack.callback(setattr, owner, name, found)
                    setattr(owner, name, for_thread(original, made))
        yield


def _function_of(value: Any) -> Function | None:
    """Return the function that ``value`` is, or that a module of the distribution ``kernels`` stands for.

    Others are none, or static methods, which would get a ``self``.
    """
    if isinstance(value, nn.Module):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    return value if isinstance(value, FunctionType) else None


def all_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with the defaults of those that are left out."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def gives_the_same(
    original: Function,
    replacement: Function,
    calls: Iterator[dict[str, Any]],
    is_same: Callable[[Tensor, Tensor], bool] | None = None,
) -> bool:
    """Return whether both functions give the same tensors for all calls, by ``is_same``.

    The default is equality, up to the rounding of floats.
    """
    is_same = is_same or equal_to_rounding
    with torch.no_grad():
        for call in calls:
            try:
                want, got = original(**call), replacement(**call)
                pairs = list(zip(want, got, strict=True)) if isinstance(want, tuple) else [(want, got)]
                if not all(is_same(a, b) for a, b in pairs):
                    return False
            except Exception:  # a function of another kind may refuse these inputs, or give anything
                return False
    return True


def equal_to_rounding(want: Tensor, got: Tensor) -> bool:
    """Return whether two tensors are equal, but for the rounding of floats in a few operations."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if not want.is_floating_point() or not want.numel():
        return torch.equal(want, got)
    return bool((want - got).abs().max() <= torch.finfo(want.dtype).eps ** 0.75 * want.abs().max())
