"""Reports: what was adapted, swapped, merged. Dataclasses with the numbers, which print as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptc.binding import Binding
    from adaptc.passes.merge import SiteMerge
    from adaptc.program import AdaptedProgram


def bar(what: str, show: bool) -> Callable[[Sequence[Any]], Any]:
    """A progress bar around a sequence, or the sequence itself."""
    if not show:
        return iter

    def track(items: Sequence[Any]) -> Any:
        from rich.progress import track as rich_track

        return rich_track(items, description=what)

    return track


@dataclass(frozen=True)
class SwapReport:
    """``sites`` the adapter has, ``identity`` sites of the program it leaves at the base."""

    source: str
    sites: int
    identity: tuple[str, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, program: AdaptedProgram, binding: Binding) -> SwapReport:
        ids = [a.id for a in program.adaptation.attachments]
        ranks = {r for m in binding.methods.values() if (r := getattr(m, "r", None)) is not None}
        missing = tuple(i.partition("|")[0] for i in ids if i not in binding.methods)
        return cls(binding.source, len(binding.methods), missing, tuple(sorted(ranks)))

    def __str__(self) -> str:
        rest = f", {len(self.identity)} left at the base" if self.identity else ""
        return f"{self.source}: {self.sites} sites, rank {', '.join(map(str, self.ranks)) or '-'}{rest}"


@dataclass(frozen=True)
class MergeReport:
    """One :class:`SiteMerge` per merged weight."""

    sites: Sequence[SiteMerge]
    source: str

    @property
    def max_error(self) -> float:
        return max((s.error for s in self.sites), default=0.0)


@dataclass(frozen=True)
class CoverageReport:
    """Sites with their slots, parameters trained, matches per target entry, and what was left out and why."""

    matches: Mapping[str, Sequence[str]]
    left_out: Sequence[Sequence[str]]
    trainable: int
    total: int

    @classmethod
    def of(cls, program: AdaptedProgram) -> CoverageReport:
        a = program.adaptation
        values = program.binding.values
        trainable = sum(t.numel() for t in values.values() if t.requires_grad)
        total = sum(t.numel() for t in program.parameters())
        return cls(a.matches, a.left_out, trainable, total)
