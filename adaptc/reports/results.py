"""Report what was swapped and merged, in dataclasses with the numbers, which print as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from adaptc.passes.adapt.merging.site_merge import SiteMerge
from adaptc.passes.quantized.quantize_weights import WeightQuantization
from adaptc.tables import (
    WIDTH,
    Column,
    Report,
    Table,
    as_text,
    dtype_name,
    format_bytes,
    format_error,
    format_error_or_dash,
)


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """A report of a merge: one :class:`SiteMerge` per merged weight, and where the adapter came from.

    A site's ``delta`` is the largest change of an element, and its ``error`` the largest rounding of one to the
    weight's dtype. Their quotient tells how much of the change rounding may hide. Where a low-rank correction stands
    beside the weight, ``error`` is what it leaves of ``rounding_error``.
    """

    ROWS = ("weights",)

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

    def sites_by_error(self) -> list[SiteMerge]:
        """Return the sites, largest error first."""
        return sorted(self.sites, key=lambda s: (s.error, _relative_error(s)), reverse=True)

    def render(self, width: int = WIDTH, most: int = 20) -> str:
        """Return the report as text, with the ``most`` sites of largest error."""
        return as_text(self.sections(most), width)

    def sections(self, max_rows: int = 20) -> list[str | Table]:
        dtypes = ", ".join(sorted({dtype_name(s.dtype) for s in self.sites})) or "nothing"
        untied = f", {len(self.untied)} untied" if self.untied else ""
        head = (
            f"merged {len(self.sites)} weights ({dtypes}) from {self.source}{untied}: "
            f"largest change {format_error(self.max_delta)}, largest rounding error {format_error(self.max_error)}"
        )
        ordered = self.sites_by_error()
        rows = [
            (
                s.fqn,
                dtype_name(s.dtype),
                format_error_or_dash(s.delta),
                format_error_or_dash(s.error),
                _format_percent(s),
                "yes" if s.untied else "-",
            )
            for s in ordered[:max_rows]
        ]
        number_columns = [Column(n, right=True, no_wrap=True) for n in ("largest change", "rounding error", "relative")]
        columns: list[str | Column] = ["weight", "dtype", *number_columns, "untied"]
        if any(s.correction_rank for s in ordered):
            columns.append("correction")
            corrections = [
                f"rank {s.correction_rank}, from {format_error(s.rounding_error)}" if s.correction_rank else "-"
                for s in ordered[:max_rows]
            ]
            rows = [(*row, correction) for row, correction in zip(rows, corrections, strict=True)]
        omitted = len(ordered) - len(rows)
        more = (
            f"and {omitted} more, each with a rounding error of at most {format_error(ordered[max_rows].error)}"
            if omitted > 0
            else ""
        )
        return [head, Table(columns, rows), more]

    def values(self) -> dict[str, Any]:
        """Return ``source``, ``largest_change``, ``largest_error``, ``untied`` (FQNs) and ``weights`` (one dict
        each)."""
        return {
            "source": self.source,
            "largest_change": self.max_delta,
            "largest_error": self.max_error,
            "untied": list(self.untied),
            "weights": [
                {
                    "weight": s.fqn,
                    "dtype": dtype_name(s.dtype),
                    "change": s.delta,
                    "error": s.error,
                    **(
                        {"correction_rank": s.correction_rank, "rounding_error": s.rounding_error}
                        if s.correction_rank
                        else {}
                    ),
                }
                for s in self.sites
            ],
        }


@dataclass(frozen=True, repr=False)
class QuantizeReport(Report):
    """A report of ``adaptc.quantize``: one :class:`WeightQuantization` per weight.

    A weight's ``error`` is the norm of its change over its norm.
    """

    ROWS = ("weights",)

    weights: Sequence[WeightQuantization]

    @property
    def bytes_before(self) -> int:
        """Return the bytes of the weights before."""
        return sum(w.bytes_before for w in self.weights)

    @property
    def bytes_after(self) -> int:
        """Return the bytes of what is stored."""
        return sum(w.bytes_after for w in self.weights)

    @property
    def max_error(self) -> float:
        """Return the largest error of a weight."""
        return max((w.error for w in self.weights), default=0.0)

    def render(self, width: int = WIDTH, most: int = 20) -> str:
        """Return the report as text, with the ``most`` weights of largest error."""
        return as_text(self.sections(most), width)

    def sections(self, max_rows: int = 20) -> list[str | Table]:
        schemes = "; ".join(sorted({w.scheme for w in self.weights}))
        head = (
            f"quantised {len(self.weights)} weights ({schemes}): {format_bytes(self.bytes_before)} -> "
            f"{format_bytes(self.bytes_after)}, largest error {self.max_error:.2%}"
        )
        ordered = sorted(self.weights, key=lambda w: w.error, reverse=True)
        rows = [
            (w.fqn, w.scheme, f"{w.error:.2%}", format_bytes(w.bytes_before), format_bytes(w.bytes_after))
            for w in ordered[:max_rows]
        ]
        number_columns = [Column(n, right=True, no_wrap=True) for n in ("error", "before", "after")]
        omitted = len(ordered) - len(rows)
        more = f"and {omitted} more, each with an error of at most {ordered[max_rows].error:.2%}" if omitted > 0 else ""
        return [head, Table(["weight", "scheme", *number_columns], rows), more]

    def values(self) -> dict[str, Any]:
        """Return ``bytes_before``, ``bytes_after``, ``largest_error`` and ``weights`` (one dict each)."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "largest_error": self.max_error,
            "weights": [
                {
                    "weight": w.fqn,
                    "scheme": w.scheme,
                    "error": w.error,
                    "bytes_before": w.bytes_before,
                    "bytes_after": w.bytes_after,
                }
                for w in self.weights
            ],
        }


def _relative_error(s: SiteMerge) -> float:
    """Return the rounding error relative to the change; NaN where there is no change to compare with."""
    return s.error / s.delta if s.delta and not isnan(s.delta) else nan


def _format_percent(s: SiteMerge) -> str:
    return "-" if isnan(_relative_error(s)) else f"{100 * _relative_error(s):.3g}%"
