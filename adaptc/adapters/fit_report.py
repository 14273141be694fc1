"""Report how near a LoRA adapter is to the changes of weights that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from adaptc.tables import Column, Report, Table, format_error, shorten_paths


@dataclass(frozen=True)
class SiteFit:
    """The fit of one weight: the ``rank`` that was kept of ``full_rank``, and two Frobenius norms.

    ``change`` is the norm of the change. ``error`` is that of the part that was left out, divided by ``change``.
    """

    site: str
    rank: int
    full_rank: int
    change: float
    error: float


@dataclass(frozen=True, repr=False)
class FitReport(Report):
    """A report with one :class:`SiteFit` for each weight. ``saved_modules`` has modules that are saved as a whole."""

    ROWS = ("weights",)

    source: str
    sites: Sequence[SiteFit]
    saved_modules: Sequence[str] = ()

    @property
    def error(self) -> float:
        """Return the relative error of all weights together."""
        total = sum(s.change**2 for s in self.sites)
        return sqrt(sum((s.change * s.error) ** 2 for s in self.sites) / total) if total else 0.0

    @property
    def kept_energy(self) -> float:
        """Return the part of the energy that the adapter has, where energy is the sum of the squared singular
        values."""
        return 1 - self.error**2

    def sections(self, max_rows: int = 20) -> list[str | Table]:
        ordered = sorted(self.sites, key=lambda s: s.error, reverse=True)
        head = (
            f"LoRA of {self.source}: {len(self.sites)} weights, relative error {format_error(self.error)}, "
            f"{100 * self.kept_energy:.4g}% of the energy"
        )
        numbers = [Column(n, right=True, no_wrap=True) for n in ("rank", "of", "change", "relative error")]
        rows = [
            (s.site, s.rank, s.full_rank, format_error(s.change), format_error(s.error)) for s in ordered[:max_rows]
        ]
        more = f"and {len(ordered) - max_rows} more, with smaller errors" if len(ordered) > max_rows else ""
        whole = f"as they are: {shorten_paths(self.saved_modules)}" if self.saved_modules else ""
        return [head, Table(["weight", *numbers], rows), "\n".join(t for t in (more, whole) if t)]

    def values(self) -> dict[str, Any]:
        """Return a dict of ``source``, ``error``, ``kept``, ``whole``, and ``weights``, a list with one dict each."""
        return {
            "source": self.source,
            "error": self.error,
            "kept": self.kept_energy,
            "whole": list(self.saved_modules),
            "weights": [{"weight": s.site, **{k: v for k, v in vars(s).items() if k != "site"}} for s in self.sites],
        }
