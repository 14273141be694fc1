"""The sizes that adapters of a method choose, such as the rank, and what follows from the sizes of a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class SizeRule(MethodPart):
    """The sizes that adapters choose. By default it is the rank, if the method has the field ``r``.

    Args:
        exact: whether the size of a slot along a free axis has a meaning, so that the slot must not be padded to a
            larger one.
        rank_axes: slot name -> the axis whose size is the rank, for the slots of a file that show it. The first of them
            that a file has counts. A method whose sizes follow from tensors otherwise defines :meth:`with_sizes_of`.

    Arguments of the functions:
        - `op`: the op that reads the weight, an :class:`adaptc.methods.Op`.
        - `rank`: the rank.
        - `slots`: name -> tensor of the adapter at this site.

    Example:
        >>> class Width(adaptc.methods.SizeRule):
        ...     def rank(self):
        ...         return self.method.width
        >>> @dataclass(frozen=True)
        ... class WideShift(Shift):
        ...     sizes = Width()
        ...     width: int = 4
        >>> WideShift().sizes.rank()
        4
    """

    def __init__(self, exact: bool = False, rank_axes: Mapping[str, int] | None = None) -> None:
        self.exact, self.rank_axes = exact, rank_axes or {}

    def rank(self) -> int | None:
        """Return the size that adapters choose, for reports and limits: the field ``r``, or None without one."""
        return next((getattr(self.method, f.name) for f in dataclasses.fields(self.method) if f.name == "r"), None)

    def with_rank(self, op: Op, rank: int) -> Any:
        """Return the method with at least that rank at a site, as a multiple of its groups; None without a rank."""
        if self.rank() is None or "r" not in self.method.swappable:
            return None
        return dataclasses.replace(self.method, r=-(-rank // op.groups) * op.groups)

    def minimal(self, op: Op) -> Any:
        """Return the method with the smallest sizes that the runtime takes: compilers specialise on 0 and 1.

        By default the rank is 2 in each of the site's groups, where adapters choose it and sizes are not ``exact``.
        """
        small = None if self.exact else self.with_rank(op, 2 * op.groups)
        return self.method if small is None else small

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        """Return the method with its free sizes, such as the rank, read from slot tensors instead of a config.

        By default the rank is read along ``rank_axes``. Tensors with too few axes are left for the check of shapes.
        """
        for name, axis in self.rank_axes.items():
            if (t := slots.get(name)) is not None and -t.ndim <= axis < t.ndim:
                return dataclasses.replace(self.method, r=t.shape[axis])
        return self.method

    def specialized_for(self, op: Op) -> Any:
        """Return the method with the fields of ``structure()`` filled in that follow from the site's sizes."""
        return self.method
