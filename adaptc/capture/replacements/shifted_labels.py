"""Let encoder-decoders shift labels of any length while they are traced.

Such a model makes its decoder's inputs from labels: ``shifted[:, 1:] = labels[:, :-1].clone()``. torch guards the
length of such a slice against 1. So a program would refuse labels of one or two tokens, such as the name of a class.
Here the same assignment is computed from tensors of the labels' own length. So is ``cat([first, lengths[:-1]])``, from
which a model of sounds computes where each sound begins, where ``first`` has one entry.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_functions import Function, replaced_functions

#: what transformers calls functions that shift labels or lengths, in a model's module and in its classes
_NAMES = ("shift_tokens_right", "_shift_right", "_build_audio_timestamps")
_ALL, _ALL_BUT_LAST, _ALL_BUT_FIRST = slice(None), slice(None, -1), slice(1, None)


class _AllButLast:
    """``tensor[..., :-1]``, which is not computed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def clone(self) -> _AllButLast:
        return _AllButLast(self.tensor.clone())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What has this passes torch's check of arguments, and reaches the mode.
        return NotImplemented


class _ShiftByRoll(TorchFunctionMode):
    """Compute ``to[..., 1:] = source[..., :-1]`` and ``cat([first, source[:-1]])`` by ``torch.roll``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _is_along_last(args[1], _ALL_BUT_LAST, args[0].ndim):
            return _AllButLast(args[0])
        if func is torch.cat and _is_first_and_rest(args, kwargs):
            first, source = args[0][0], args[0][1].tensor
            is_first = torch.arange(source.shape[0], device=source.device) == 0
            return torch.where(is_first, first, torch.roll(source, 1))
        if func is Tensor.__setitem__ and isinstance(args[2], _AllButLast) and _is_along_last(args[1], _ALL_BUT_FIRST):
            to, source = args[0], args[2].tensor
            is_first = torch.arange(to.shape[-1], device=to.device) == 0
            return to.copy_(torch.where(is_first, to, torch.roll(source, 1, -1)))
        return func(*args, **(kwargs or {}))


def _is_first_and_rest(args: Any, kwargs: Any) -> bool:
    """Return whether ``torch.cat`` is asked for a tensor of one entry, and all but the last of another one."""
    if len(args) != 1 or kwargs or len(args[0]) != 2 or not isinstance(args[0][1], _AllButLast):
        return False
    first, source = args[0][0], args[0][1].tensor
    return isinstance(first, Tensor) and source.ndim == 1 and tuple(first.shape) == (1,)


def _is_along_last(key: Any, along: slice, ndim: int = 2) -> bool:
    if ndim == 1:
        return _is_slice(key, along)
    if not isinstance(key, tuple) or len(key) != 2:
        return False
    return (key[0] is ... or _is_slice(key[0], _ALL)) and _is_slice(key[1], along)


def _is_slice(key: Any, expected: slice) -> bool:
    """Return whether ``key`` is that slice. A symbolic bound is none: comparing it would add a guard."""
    if not isinstance(key, slice):
        return False
    bounds = zip((key.start, key.stop, key.step), (expected.start, expected.stop, expected.step), strict=True)
    return all(a is b or (type(a) is int and a == b) for a, b in bounds)


def shift_labels_of_any_length(model: nn.Module) -> AbstractContextManager[None]:
    """Run the block with functions of ``model`` that shift labels of any length, in this thread.

    A function that uses ``labels[:, :-1]`` in another way stays as it is.
    """

    def by_roll(function: Function) -> Function:
        @functools.wraps(function)
        def shift(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(AttributeError, TypeError), _ShiftByRoll():
                return function(*args, **kwargs)
            return function(*args, **kwargs)

        return shift

    return replaced_functions(model, dict.fromkeys(_NAMES, by_roll))
