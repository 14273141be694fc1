"""Find the axes of slots whose sizes an adapter chooses, and which of these sizes are one.

A compiler gets a symbol for each such size. So code that is made once serves adapters of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
    """Return slot FQN -> axis -> how its size follows from a free size, for the free axes of slots.

    Sites that share a slot with a rank have one rank.
    """
    axes_by_slot: dict[str, dict[int, FreeSize]] = {}
    ranks = [_SiteRank.of(n, a, ops[a.id]) for n, a in enumerate(attachments)]
    groups: dict[str, list[_SiteRank]] = {}
    for rank in ranks:
        joined = {id(groups[slot]): groups[slot] for slot in rank.times if slot in groups}
        group = [*chain.from_iterable(joined.values()), rank]
        groups |= {slot: group for member in group for slot in member.times}
    for rank in ranks:
        group = next((groups[slot] for slot in rank.times), [rank])
        # Inductor reads a symbol off an axis whose size is that symbol alone. Stacked experts have no axis of the
        # rank itself, only rank times experts, so the symbol is that multiple of the rank.
        unit = gcd(*(t for member in group for axes in member.times.values() for t in axes.values())) or 1
        name, is_rank = f"rank_{group[0].number}", all(member.is_rank for member in group)
        for slot, axes in rank.times.items():
            axes_by_slot.setdefault(slot, {i: FreeSize(name, t // unit, unit, is_rank) for i, t in axes.items()})
        for slot, axes in rank.apart.items():
            axes_by_slot.setdefault(slot, {i: FreeSize(f"size_{rank.number}_{s}", 1) for i, s in axes.items()})
    return axes_by_slot


@dataclass(frozen=True)
class _SiteRank:
    """The free axes of one site: slot FQN -> axis -> multiple of the rank, and those that have ``apart`` sizes by name.

    ``is_rank`` is False where the size that the first are multiples of is no rank.
    """

    number: int
    times: Mapping[str, Mapping[int, int]]
    apart: Mapping[str, Mapping[int, str]]
    is_rank: bool

    @classmethod
    def of(cls, number: int, a: Attachment, op: Op) -> _SiteRank:
        small = a.method.sizes.minimal(op)
        ranked = small != a.method or (small.sizes.minimal(op) == small and small.sizes.rank() is not None)
        ranked = ranked and not a.method.sizes.exact
        # The smallest method has rank two, times the groups or experts that share an axis.
        specs = {s: spec for s, spec in small.slots(op).items() if spec.free}
        times = {
            a.slots[s]: {i: spec.shape[i] // 2 if ranked else 1 for i in spec.free}
            for s, spec in specs.items()
            if not spec.apart
        }
        apart = {a.slots[s]: spec.size_names(s) for s, spec in specs.items() if spec.apart}
        return cls(number, times, apart, ranked)
