"""The sizes that adapters of a method choose, such as the rank, and what follows from the sizes of a site."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class SizeRule(MethodPart):
    """The sizes that adapters choose. By default it is the rank, if the method has the field ``r``.

    Args:
        exact: whether the size of a slot along a free axis has a meaning, so that the slot must not be padded to a
            larger one.

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

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

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
        """Return the method with its free sizes, such as the rank, read from slot tensors instead of a config."""
        return self.method

    def specialized_for(self, op: Op) -> Any:
        """Return the method with the fields of ``structure()`` filled in that follow from the site's sizes."""
        return self.method
