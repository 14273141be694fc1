"""Report what was swapped and merged, in dataclasses with the numbers, which print as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan, nan
from typing import Any

from adaptc.adapter_files.origin import PEFT, FileOrigin
from adaptc.binding.binding import Binding
from adaptc.passes.adapt.merge_pass import SiteMerge
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.tables import WIDTH, Column, Report, Table, as_text, dtype_name, number, plain, shortened, small


@dataclass(frozen=True, repr=False)
class SwapReport(Report):
    """A report of a swap.

    ``sites``: the number of sites that the adapter has. ``identity``: the weights that it leaves at the base.
    ``seconds``: the time that the swap took. ``origin``: the format of the adapter's file, the component that was
    taken, and the components that were not. The report of adapters that act together is of all of them: a weight is
    left at the base where none has a site.

    Counts are made when they are first asked for, since most reports are not read.
    """

    source: str
    attachments: Sequence[Attachment] = field(repr=False)
    methods: Mapping[str, Method] = field(repr=False)
    seconds: float = nan
    origin: FileOrigin = PEFT

    @classmethod
    def of(cls, attachments: Sequence[Attachment], binding: Binding, seconds: float = nan) -> SwapReport:
        """Return the report of a swap to ``binding`` in a program with these attachments."""
        return cls(binding.source, attachments, binding.methods, seconds, binding.origin)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        changed = {a.fqn for a in self.attachments if a.id in self.methods}
        return tuple(dict.fromkeys(a.fqn for a in self.attachments if a.fqn not in changed))

    @property
    def sites(self) -> int:
        return sum(a.id in self.methods for a in self.attachments)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({r for m in self.methods.values() if (r := m.rank()) is not None}))

    def parts(self) -> list[str | Table]:
        total = len(self.attachments)
        rank = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        took = "" if isnan(self.seconds) else f", {1000 * self.seconds:.1f} ms"
        rest = f"\nleft at the base: {shortened(self.identity)}" if self.identity else ""
        rest += f"\nnot of this program: {self.origin.left}" if self.origin.others else ""
        form = "" if self.origin == PEFT else f" [{self.origin}]"
        return [f"{self.source}{form}: {self.sites} of {total} sites{rank}{took}{rest}"]

    def data(self) -> dict[str, Any]:
        """Return ``source``, ``format``, ``sites`` (their number), ``left_at_the_base`` (FQNs), ``ranks`` and
        ``seconds``."""
        return {
            "source": self.source,
            "format": str(self.origin),
            "sites": self.sites,
            "left_at_the_base": list(self.identity),
            "ranks": list(self.ranks),
            "seconds": plain(self.seconds),
        }


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """A report of a merge: one :class:`SiteMerge` per merged weight, and where the adapter came from.

    A site's ``delta`` is the largest change of an element, and its ``error`` the largest rounding of one to the
    weight's dtype. Their quotient tells how much of the change rounding may hide.
    """

    sites: Sequence[SiteMerge]
    source: str

    @property
    def max_error(self) -> float:
        return max((s.error for s in self.sites), default=0.0)

    @property
    def max_delta(self) -> float:
        """Return the largest change of an element; 0 where no site changed. Sites whose weight changed its shape have
        no delta and do not count."""
        return max((s.delta for s in self.sites if not isnan(s.delta)), default=0.0)

    @property
    def untied(self) -> tuple[str, ...]:
        """Return the weights that were tied to another name and are weights of their own now."""
        return tuple(s.fqn for s in self.sites if s.untied)

    def worst(self) -> list[SiteMerge]:
        """Return the sites, largest error first."""
        return sorted(self.sites, key=lambda s: (s.error, _relative(s)), reverse=True)

    def render(self, width: int = WIDTH, most: int = 20) -> str:
        """Return the report as text, with the ``most`` sites of largest error."""
        return as_text(self.parts(most), width)

    def parts(self, most: int = 20) -> list[str | Table]:
        dtypes = ", ".join(sorted({dtype_name(s.dtype) for s in self.sites})) or "nothing"
        untied = f", {len(self.untied)} untied" if self.untied else ""
        head = (
            f"merged {len(self.sites)} weights ({dtypes}) from {self.source}{untied}: "
            f"largest change {small(self.max_delta)}, largest rounding error {small(self.max_error)}"
        )
        ordered = self.worst()
        rows = [
            (s.fqn, dtype_name(s.dtype), number(s.delta), number(s.error), _percent(s), "yes" if s.untied else "-")
            for s in ordered[:most]
        ]
        numbers = [Column(n, right=True, keep=True) for n in ("largest change", "rounding error", "relative")]
        rest = len(ordered) - len(rows)
        more = (
            f"and {rest} more, each with a rounding error of at most {small(ordered[most].error)}" if rest > 0 else ""
        )
        return [head, Table(["weight", "dtype", *numbers, "untied"], rows), more]

    def data(self) -> dict[str, Any]:
        """Return ``source``, ``largest_change``, ``largest_error``, ``untied`` (FQNs) and ``weights`` (one dict
        each)."""
        return {
            "source": self.source,
            "largest_change": plain(self.max_delta),
            "largest_error": plain(self.max_error),
            "untied": list(self.untied),
            "weights": [
                {"weight": s.fqn, "dtype": dtype_name(s.dtype), "change": plain(s.delta), "error": plain(s.error)}
                for s in self.sites
            ],
        }


def _relative(s: SiteMerge) -> float:
    """Return the rounding error relative to the change; NaN where there is no change to compare with."""
    return s.error / s.delta if s.delta and not isnan(s.delta) else nan


def _percent(s: SiteMerge) -> str:
    return "-" if isnan(_relative(s)) else f"{100 * _relative(s):.3g}%"
