"""Report how near a LoRA adapter is to the changes of weights that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from adaptc.tables import Column, Report, Table, shortened, small


@dataclass(frozen=True)
class SiteFit:
    """The fit of one weight: the ``rank`` that was kept of ``full``, and two Frobenius norms.

    ``change`` is the norm of the change. ``error`` is that of the part that was left out, divided by ``change``.
    """

    site: str
    rank: int
    full: int
    change: float
    error: float


@dataclass(frozen=True, repr=False)
class FitReport(Report):
    """A report with one :class:`SiteFit` for each weight. ``whole`` lists modules that the adapter has whole."""

    source: str
    sites: Sequence[SiteFit]
    whole: Sequence[str] = ()

    @property
    def error(self) -> float:
        """Return the relative error of all weights together."""
        total = sum(s.change**2 for s in self.sites)
        return sqrt(sum((s.change * s.error) ** 2 for s in self.sites) / total) if total else 0.0

    @property
    def kept(self) -> float:
        """Return the part of the energy that the adapter has, where energy is the sum of the squared singular
        values."""
        return 1 - self.error**2

    def parts(self, most: int = 20) -> list[str | Table]:
        ordered = sorted(self.sites, key=lambda s: s.error, reverse=True)
        head = (
            f"LoRA of {self.source}: {len(self.sites)} weights, relative error {small(self.error)}, "
            f"{100 * self.kept:.4g}% of the energy"
        )
        numbers = [Column(n, right=True, keep=True) for n in ("rank", "of", "change", "relative error")]
        rows = [(s.site, s.rank, s.full, small(s.change), small(s.error)) for s in ordered[:most]]
        more = f"and {len(ordered) - most} more, with smaller errors" if len(ordered) > most else ""
        whole = f"as they are: {shortened(self.whole)}" if self.whole else ""
        return [head, Table(["weight", *numbers], rows), "\n".join(t for t in (more, whole) if t)]

    def data(self) -> dict[str, Any]:
        """Return a dict of ``source``, ``error``, ``kept``, ``whole``, and ``weights``, a list with one dict each."""
        return {
            "source": self.source,
            "error": self.error,
            "kept": self.kept,
            "whole": list(self.whole),
            "weights": [{"weight": s.site, **{k: v for k, v in vars(s).items() if k != "site"}} for s in self.sites],
        }
