"""Report the singular values of what an adapter adds to each weight: how much of its rank it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from adaptc.adapters.deltas.site_deltas import effective_rank, singular_values, site_deltas
from adaptc.progress import stage
from adaptc.tables import Column, Report, Table, format_error


@dataclass(frozen=True)
class SiteSpectrum:
    """The spectrum of the change at one site.

    ``rank``: that of the adapter's config, None where its method has none. ``singular_values``: of the change, the
    largest first.
    """

    site: str
    rank: int | None
    effective_rank: float
    singular_values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Return the Frobenius norm of the change."""
        return sqrt(sum(s * s for s in self.singular_values))


@dataclass(frozen=True, repr=False)
class SpectrumReport(Report):
    """A report of the spectrum of each change that an adapter makes, in the order of its sites."""

    ROWS = ("sites",)

    source: str
    sites: Sequence[SiteSpectrum]

    def sections(self, max_rows: int = 20) -> list[str | Table]:
        ordered = sorted(self.sites, key=lambda s: s.effective_rank / (s.rank or 1))
        rows = [
            (s.site, s.rank or "-", f"{s.effective_rank:.2f}", format_error(s.norm), _describe(s.singular_values))
            for s in ordered[:max_rows]
        ]
        numbers = [Column(n, right=True, no_wrap=True) for n in ("rank", "effective rank", "change")]
        more = f"and {len(ordered) - max_rows} more, which use more of their rank" if len(ordered) > max_rows else ""
        return [f"{self.source}: {len(self.sites)} sites", Table(["site", *numbers, "singular values"], rows), more]

    def values(self) -> dict[str, Any]:
        """Return ``source`` and ``sites`` (one dict each, with the norm of the ``change``)."""
        return {"source": self.source, "sites": [{**vars(s), "change": s.norm} for s in self.sites]}


def _describe(values: Sequence[float]) -> str:
    return ", ".join([*map(format_error, values[:3]), *(["..."] if len(values) > 3 else [])])


def measure_spectra(adapter: Any) -> SpectrumReport:
    """Return the singular values and the effective rank of what an adapter adds to each weight.

    The effective rank is e to the entropy of the singular values over their sum (Roy and Vetterli, 2007). It is the
    rank where all are equal, and smaller the more a few of them dominate. LoRA's factors are not multiplied out.

    Args:
        adapter: a PEFT directory, an :class:`adaptc.Adapter`, a program or generator, whose current adapter is meant,
            or a result of ``bind``. Methods other than LoRA need one of the last three.

    Returns:
        a report with the spectrum of each site; ``print`` shows it as a table.

    Raises:
        ConfigError: the adapter changes no weights by matrices, or only a program tells how.
        CheckpointError: the adapter is damaged.

    Example:
        >>> adaptc.debug.measure_spectra(prog).sites[0].rank
        2
    """
    found = site_deltas(adapter)
    sites: list[SiteSpectrum] = []
    with stage(f"measuring the changes of {len(found)} weights") as running:
        for site in running.track(list(found)):
            values = singular_values(found[site].read())
            sites.append(SiteSpectrum(site, found[site].rank, effective_rank(values), tuple(values.tolist())))
    return SpectrumReport(describe_source(adapter), tuple(sites))


def describe_source(adapter: Any) -> str:
    """Return what a report calls an adapter."""
    binding = getattr(adapter, "binding", None)
    return str(getattr(adapter, "source", "") or getattr(binding, "source", "") or adapter)
