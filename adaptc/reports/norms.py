"""Report norms of an adapter's tensors, and of the change of each weight: what training did, and where it did nothing.

The norms are those of the moment when they are asked for; the program may be trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.tables import (
    Column,
    Report,
    Table,
    collapse_paths,
    format_error,
    path_numbers,
    path_pattern,
    with_count,
)

#: the name of the row with a weight's change, among the tensors of its site
CHANGE = "change / weight"


@dataclass(frozen=True)
class SiteNorms:
    """The Frobenius norms at one site.

    ``slots``: the norm of each of the adapter's tensors there, by its name in PEFT's files. ``change``: the norm of
    what the adapter adds to the weight; adapters that act together share it. ``weight``: the norm of the base weight.
    Both are None where they were not asked for, or the method changes no weight.
    """

    fqn: str
    slots: Mapping[str, float]
    change: float | None = None
    weight: float | None = None
    #: the adapter's name, where several act together
    adapter: str = ""

    @property
    def relative_change(self) -> float | None:
        """Return the change over the weight; None where either is unknown or the weight is zero."""
        return self.change / self.weight if self.change is not None and self.weight else None

    def norm_by_row(self) -> dict[str, float]:
        """Return all norms that a table shows of the site, by the name of the row."""
        change = self.relative_change
        return {**self.slots, **({} if change is None else {CHANGE: change})}


@dataclass(frozen=True, repr=False)
class Norms(Report):
    """A report of the norms at each site that the adapter has, in the order of the program's sites."""

    ROWS = ()
    ROW_NAME = "site"

    sites: Sequence[SiteNorms] = ()

    @classmethod
    def from_program(cls, program: AdaptedProgram, changes: bool) -> Norms:
        """Return the norms of a program that nobody swaps meanwhile. ``changes``: also compute the change of every
        adapted weight, one weight at a time."""
        binding = program.binding
        changes_by_site = dict(_weight_changes(program, binding)) if changes else {}
        norm_by_slot: dict[str, float] = {}
        sites = []
        for a in program.adaptation.attachments:
            method = binding.methods.get(a.id)
            if method is not None:
                specs, values = method.slots(program.ops[a.id]), binding.values
                names = [n for n, f in a.slots.items() if n in specs and _has_norm(values[f])]
                slots = {n: _slot_norm(a.slots[n], values, norm_by_slot) for n in names}
                name = a.adapter if binding.joint_adapters else ""
                sites.append(SiteNorms(a.fqn, slots, *changes_by_site.get(a.fqn, (None, None)), adapter=name))
        return cls(tuple(sites))

    def sections(self) -> list[Table]:
        """Return a table with a row for each tensor of layers that differ in their number alone. It has the median of
        their norms, and the layers in which the norm is smallest and largest."""
        rows = [row for members in _group_layers(self.sites) for row in _table_rows(members)]
        columns = [Column(n, right=True, no_wrap=True) for n in ("median", "smallest", "in", "largest", "in")]
        return [Table(["site", Column("norm of", no_wrap=True), *columns], rows)]

    def values(self) -> dict[str, Any]:
        """Return the site's parameter -> ``slots`` (name -> norm), ``change`` and ``weight``. Where several adapters
        act together, the key also has the adapter's name."""
        return {
            _site_label(s.fqn, s.adapter): {"slots": s.slots, "change": s.change, "weight": s.weight}
            for s in self.sites
        }


def _site_label(site: str, adapter: str) -> str:
    return f"{site} ({adapter})" if adapter else site


def _group_layers(sites: Iterable[SiteNorms]) -> list[list[SiteNorms]]:
    """Return the sites in groups: the same layer of several blocks, with the same tensors."""

    def key(site: SiteNorms) -> Any:
        return path_pattern(site.fqn), site.adapter, tuple(site.norm_by_row())

    group_numbers: dict[Any, int] = {}
    ranked = sorted(sites, key=lambda s: group_numbers.setdefault(key(s), len(group_numbers)))
    return [list(members) for _, members in groupby(ranked, key)]


def _table_rows(members: Sequence[SiteNorms]) -> Iterable[tuple[str, ...]]:
    names = [s.fqn.removesuffix(".weight") for s in members]
    site = "\n".join(with_count(_site_label(text, members[0].adapter), n) for text, n in collapse_paths(names))
    for i, tensor in enumerate(members[0].norm_by_row()):
        found = [s.norm_by_row()[tensor] for s in members]
        smallest, largest = found.index(min(found)), found.index(max(found))
        block_numbers = [path_numbers(names[at]) if len(found) > 1 else "" for at in (smallest, largest)]
        low, high = format_error(found[smallest]), format_error(found[largest])
        yield "" if i else site, tensor, format_error(median(found)), low, block_numbers[0], high, block_numbers[1]


def _slot_norm(fqn: str, values: Mapping[str, Tensor], norm_by_slot: dict[str, float]) -> float:
    """Return the norm of the slot ``fqn`` as a number; ``norm_by_slot`` has it for a slot that several sites share."""
    if fqn not in norm_by_slot:
        norm_by_slot[fqn] = float(
            torch.linalg.vector_norm(
                values[fqn].detach(), dtype=torch.complex128 if values[fqn].is_complex() else torch.float64
            )
        )
    return norm_by_slot[fqn]


def _has_norm(t: Tensor) -> bool:
    """Return whether ``t`` has a norm: positions and the like are integers."""
    return t.is_floating_point() or t.is_complex()


def _weight_changes(program: AdaptedProgram, binding: Binding) -> Iterable[tuple[str, tuple[float, float]]]:
    attachments = [a for a in program.adaptation.attachments if a.id in binding.methods]
    mergeable = [a for a in attachments if a.method.check_merge(program.ops[a.id]) is None]
    return Merge(mergeable, binding.values).weight_change_norms(program)
