"""Find the axes of slots whose sizes an adapter chooses, and which of these sizes are one.

A compiler gets a symbol for each such size. So code that is made once serves adapters of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment


@dataclass(frozen=True)
class FreeSize:
    """An axis whose size is ``times * unit`` times the free size called ``name``.

    Code has a symbol for ``unit`` times that size, since there may be no axis of the size itself.

    ``is_rank`` says that the size follows from the adapter's rank, which may be padded.
    """

    name: str
    times: int
    unit: int = 1
    is_rank: bool = False

    @property
    def unit_name(self) -> str:
        """Return the name of what the size is ``times`` of: the free size, or its multiple."""
        return self.name if self.unit == 1 else f"{self.unit}*{self.name}"

    @property
    def text(self) -> str:
        """Return the size as a multiple of the rank, or of what else an adapter chooses."""
        factor = self.times * self.unit
        return self.name if factor == 1 else f"{factor}*{self.name}"


def free_axes(attachments: Sequence[Attachment], ops: Mapping[str, Op]) -> dict[str, dict[int, FreeSize]]:
    """Return slot FQN -> axis -> how its size follows from a free size, for the free axes of slots."""
    axes_by_slot: dict[str, dict[int, FreeSize]] = {}
    for n, a in enumerate(attachments):
        op = ops[a.id]
        small = a.method.sizes.minimal(op)
        ranked = small != a.method or (small.sizes.minimal(op) == small and small.sizes.rank() is not None)
        ranked = ranked and not a.method.sizes.exact
        # The smallest method has rank two, times the groups or experts that share an axis.
        specs = small.slots(op)
        times = {
            s: {i: spec.shape[i] // 2 if ranked else 1 for i in spec.free}
            for s, spec in specs.items()
            if not spec.apart
        }
        # Inductor reads a symbol off an axis whose size is that symbol alone. Stacked experts have no axis of the
        # rank itself, only rank times experts, so the symbol is that multiple of the rank.
        unit = gcd(*(t for axes in times.values() for t in axes.values())) or 1
        for slot, axes in times.items():
            axes_by_slot.setdefault(
                a.slots[slot], {i: FreeSize(f"rank_{n}", t // unit, unit, ranked) for i, t in axes.items()}
            )
        for slot, spec in specs.items():
            if spec.apart:
                axes_by_slot.setdefault(
                    a.slots[slot], {i: FreeSize(f"size_{n}_{s}", 1) for i, s in spec.size_names(slot).items()}
                )
    return axes_by_slot
