"""Keep the features of all images in one tensor, where a model would split them by image and join them again.

Only the functions of a model that are named do so, and only while the model is traced.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TORCH = str(Path(torch.__file__).parent)


class _PatchCounts:
    """The numbers of patches of all images, or their heights, of which no list can be made while a model is traced."""

    def __floordiv__(self, merged: int) -> _PatchCounts:
        return self

    def __mul__(self, other: _PatchCounts) -> _PatchCounts:
        return self

    def __add__(self, more: int) -> _PatchCounts:
        return self

    def tolist(self) -> _PatchCounts:
        return self

    def item(self) -> _PatchCounts:
        return self


class _Listed:
    """A tensor that stands for the list of its numbers."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def tolist(self) -> Tensor:
        return self._value


def _counts_patches(sizes: Any) -> bool:
    """Return whether the sizes of a split are patch counts, as they are or in the list that torch makes of them."""
    return isinstance(sizes, _PatchCounts) or (isinstance(sizes, list) and _counts_patches(sizes[0]))


class KeepWhole(TorchFunctionMode):
    """Features of images stay in one tensor, where a function with one of ``codes`` would split them by image.

    That is a split by the numbers of patches, which are products of grids, or a list of a tensor (images, patches,
    width). What the function calls is not changed.

    Where a function with one of ``grid_codes`` lists a grid, it gets a list of the grid, which ``readers`` take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.grid_codes, self.readers = set[CodeType](), set[CodeType](), set[nn.Module]()
        self._keeps_splits = False

    @contextlib.contextmanager
    def keeping_splits(self) -> Iterator[None]:
        """Run the block, in which a function with one of ``codes`` splits nothing, whatever the sizes."""
        before, self._keeps_splits = self._keeps_splits, True
        try:
            yield
        finally:
            self._keeps_splits = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.split, Tensor.split):
            is_kept = _counts_patches(args[1]) or (self._keeps_splits and self._is_called_by(self.codes))
            return (args[0],) if is_kept else func(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.unbind) and self._is_called_by(self.grid_codes):
            # While a model is traced, a tensor lists itself by the lists of its parts.
            return [args[0]] if func is Tensor.tolist else (_Listed(args[0]),)
        if func is Tensor.prod and self._is_called_by(self.codes):
            return _PatchCounts()
        if func is Tensor.unbind and args[0].ndim < 3 and self._is_called_by(self.codes):
            return (_PatchCounts(),) if args[0].ndim == 1 else ((_PatchCounts(), _PatchCounts()),)
        if func in (Tensor.unbind, Tensor.__len__) and args[0].ndim == 3 and self._is_called_by(self.codes):
            return 1 if func is Tensor.__len__ else (args[0].flatten(0, 1),)
        return func(*args, **kwargs)

    @staticmethod
    def _is_called_by(codes: set[CodeType]) -> bool:
        """Return whether the call being handled was made in one of ``codes``, directly or by torch's own functions."""
        frame = sys._getframe(2)  # noqa: SLF001
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        return frame is not None and frame.f_code in codes
