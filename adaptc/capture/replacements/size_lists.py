"""Let lists of all indices up to a size be traced for any size: ``list(range(tensor.shape[1]))``.

Python makes such a list of single numbers, which fixes the size. A :class:`SizeList` stands for it in the files of a
model's classes. It is cut, turned round, added behind other numbers, and made a tensor of, without its numbers. Whoever
goes through it gets them one by one, and the size is fixed as before.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: the names whose calls together make such a list
_CALLS = {"list", "range"}


class SizeList:
    """The numbers ``first``, ``first + step``, ..., of which there are ``count``, behind the numbers ``before``."""

    def __init__(self, first: Any, count: Any, step: int = 1, before: tuple[Any, ...] = ()) -> None:
        self.first, self.count, self.step, self.before = first, count, step, before

    @property
    def size(self) -> Any:
        """Return how many numbers there are."""
        return len(self.before) + self.count

    def __len__(self) -> int:
        return int(self.size)

    def __iter__(self) -> Iterator[Any]:
        yield from self.before
        for i in range(int(self.count)):
            yield self.first + i * self.step

    def __radd__(self, before: Any) -> Any:
        return SizeList(self.first, self.count, self.step, (*before, *self.before))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            made = self._cut(index.start, index.stop, index.step)
            return [*self][index] if made is None else made
        if index == -1:
            return self.first + (self.count - 1) * self.step
        if isinstance(index, int) and 0 <= index < len(self.before):
            return self.before[index]
        return self.first if index == len(self.before) else [*self][index]

    def _cut(self, start: Any, stop: Any, step: Any) -> SizeList | None:
        """Return the part from ``start`` on, without the last one or with every ``step``; None for any other part."""
        at = len(self.before)
        if step == -1 and start is None and stop is None and not at:
            return SizeList(self.first + (self.count - 1) * self.step, self.count, -self.step)
        start, step = start or 0, 1 if step is None else step
        is_known = isinstance(start, int) and isinstance(step, int) and start >= 0 and step > 0
        keeps_before = start < at
        if not is_known or stop not in (None, -1) or (keeps_before and (start or step > 1)):
            return None
        left_out = 0 if keeps_before else start - at
        count = self.count - left_out - (0 if stop is None else 1)
        before = self.before if keeps_before else ()
        return SizeList(self.first + left_out * self.step, (count + step - 1) // step, self.step * step, before)

    def tensor(self, **options: Any) -> torch.Tensor:
        """Return the numbers as a tensor (size,), int64 unless ``options`` of torch.tensor say otherwise."""
        made = torch.arange(self.count, device=options.get("device")) * self.step + self.first
        if self.before:
            made = torch.cat([torch.stack([torch.full_like(made[0], n) for n in self.before]), made])
        return made.to(options.get("dtype") or made.dtype)


class _ListType(type):
    """The type of a ``list`` that makes a :class:`SizeList` of a range up to a size, and a list of all else."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SizeList):
            return args[0]
        return builtins.list(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.list)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, builtins.list)


class _List(metaclass=_ListType):
    def __class_getitem__(cls, item: Any) -> Any:
        return builtins.list[item]


@contextlib.contextmanager
def lists_of_any_size(model: nn.Module) -> Iterator[None]:
    """Run the block with such lists in the files that make them and define classes of ``model``, in this thread."""
    thread = threading.get_ident()

    def size_range(*args: Any) -> Any:
        is_size = len(args) == 1 and isinstance(args[0], torch.SymInt) and threading.get_ident() == thread
        return SizeList(0, args[0]) if is_size else range(*args)

    classes = {c for m in model.modules() for c in type(m).__mro__ if _makes_lists(c)}
    files = [vars(sys.modules[n]) for n in {c.__module__ for c in classes} if n in sys.modules]
    names = {"list": _List, "range": size_range}
    changed = [own for own in files if not names.keys() & own.keys()]
    try:
        for own in changed:
            own.update(names)
        yield
    finally:
        for own in changed:
            for name in names:
                own.pop(name, None)


def _makes_lists(kind: type) -> bool:
    codes = [getattr(f, "__code__", None) for f in vars(kind).values()]
    return any(code is not None and {*code.co_names} >= _CALLS for code in codes)
