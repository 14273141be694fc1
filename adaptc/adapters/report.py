"""How near an adapter of LoRA is to the changes it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from adaptc.tables import Column, Report, Table, shortened, small


@dataclass(frozen=True)
class SiteFit:
    """One weight: the ``rank`` that was kept of ``full``, the Frobenius norm of its ``change``, and of what was left
    out, relative to that, as ``error``."""

    site: str
    rank: int
    full: int
    change: float
    error: float


@dataclass(frozen=True, repr=False)
class FitReport(Report):
    """One :class:`SiteFit` for each weight. ``whole``: modules that are in the adapter as they are."""

    source: str
    sites: Sequence[SiteFit]
    whole: Sequence[str] = ()

    @property
    def error(self) -> float:
        """Of all weights together."""
        total = sum(s.change**2 for s in self.sites)
        return sqrt(sum((s.change * s.error) ** 2 for s in self.sites) / total) if total else 0.0

    @property
    def kept(self) -> float:
        """The part of the energy, the sum of the squares of the singular values, that the adapter has."""
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
        """``source``, ``error``, ``kept``, ``whole``, ``weights`` (one dict each)."""
        return {
            "source": self.source,
            "error": self.error,
            "kept": self.kept,
            "whole": list(self.whole),
            "weights": [{"weight": s.site, **{k: v for k, v in vars(s).items() if k != "site"}} for s in self.sites],
        }
