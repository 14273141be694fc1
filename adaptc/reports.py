"""Reports: what was adapted, swapped, merged, verified. Dataclasses with the numbers, which print as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from adaptc._tables import WIDTH, Column, dtype_name, join, shortened, small, table
from adaptc.coverage import CoverageReport, SiteCoverage

if TYPE_CHECKING:
    from adaptc.binding import Binding
    from adaptc.passes.merge import SiteMerge
    from adaptc.program import AdaptedProgram

__all__ = ["Check", "CoverageReport", "MergeReport", "SiteCoverage", "SwapReport", "VerifyReport", "bar"]


def bar(what: str, show: bool) -> Callable[[Sequence[Any]], Any]:
    """A progress bar on stderr around a sequence, or the sequence itself."""
    if not show:
        return iter

    def track(items: Sequence[Any]) -> Any:
        from rich.console import Console
        from rich.progress import track as rich_track

        return rich_track(items, description=what, console=Console(stderr=True))

    return track


@dataclass(frozen=True)
class SwapReport:
    """``sites`` the adapter has, ``identity`` sites of the program it leaves at the base, ``seconds`` it took."""

    source: str
    sites: int
    identity: tuple[str, ...]
    ranks: tuple[int, ...]
    seconds: float = nan

    @classmethod
    def of(cls, program: AdaptedProgram, binding: Binding, seconds: float = nan) -> SwapReport:
        """The report of a swap. What has to be counted is, when it is first asked for: most reports are not read."""
        new = object.__new__(cls)
        new.__dict__.update(
            source=binding.source,
            seconds=seconds,
            _of=(program.adaptation.attachments, binding.methods),
        )
        return new

    def __getattr__(self, name: str) -> Any:
        made = self.__dict__.get("_of")
        if made is None or name not in ("sites", "identity", "ranks"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        attachments, methods = made
        missing = tuple(a.fqn for a in attachments if a.id not in methods)
        ranks = {r for m in methods.values() if (r := getattr(m, "r", None)) is not None}
        self.__dict__.update(sites=len(attachments) - len(missing), identity=missing, ranks=tuple(sorted(ranks)))
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        total = self.sites + len(self.identity)
        rank = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        took = "" if isnan(self.seconds) else f", {1000 * self.seconds:.1f} ms"
        rest = f"\nleft at the base: {shortened(self.identity)}" if self.identity else ""
        return f"{self.source}: {self.sites} of {total} sites{rank}{took}{rest}"


@dataclass(frozen=True)
class MergeReport:
    """One :class:`SiteMerge` per merged weight, and where the adapter came from.

    A site's ``delta`` is the largest change of an element, its ``error`` the largest rounding of one to the weight's
    dtype; their quotient tells how much of the change rounding may hide.
    """

    sites: Sequence[SiteMerge]
    source: str

    @property
    def max_error(self) -> float:
        return max((s.error for s in self.sites), default=0.0)

    @property
    def max_delta(self) -> float:
        """0 where no site changed; sites whose weight changed its shape have no delta and do not count."""
        return max((s.delta for s in self.sites if not isnan(s.delta)), default=0.0)

    @property
    def untied(self) -> tuple[str, ...]:
        """Weights that were tied to another name and are weights of their own now."""
        return tuple(s.fqn for s in self.sites if s.untied)

    def worst(self) -> list[SiteMerge]:
        """The sites, largest error first."""
        return sorted(self.sites, key=lambda s: (s.error, _relative(s)), reverse=True)

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH, most: int = 20) -> str:
        """The report as text, with the ``most`` sites of largest error."""
        dtypes = ", ".join(sorted({dtype_name(s.dtype) for s in self.sites})) or "nothing"
        untied = f", {len(self.untied)} untied" if self.untied else ""
        head = (
            f"merged {len(self.sites)} weights ({dtypes}) from {self.source}{untied}: "
            f"largest change {small(self.max_delta)}, largest rounding error {small(self.max_error)}"
        )
        ordered = self.worst()
        rows = [
            (s.fqn, dtype_name(s.dtype), _number(s.delta), _number(s.error), _percent(s), "yes" if s.untied else "-")
            for s in ordered[:most]
        ]
        numbers = [Column(n, right=True, keep=True) for n in ("largest change", "rounding error", "relative")]
        rest = len(ordered) - len(rows)
        more = (
            f"and {rest} more, each with a rounding error of at most {small(ordered[most].error)}" if rest > 0 else ""
        )
        body = table(["weight", "dtype", *numbers, "untied"], rows, width=width)
        return join(head, f"{body}\n{more}" if more else body)


def _relative(s: SiteMerge) -> float:
    """Rounding error relative to the change; not a number where there is no change to compare with."""
    return s.error / s.delta if s.delta and not isnan(s.delta) else nan


def _percent(s: SiteMerge) -> str:
    return "-" if isnan(_relative(s)) else f"{100 * _relative(s):.3g}%"


def _number(value: float) -> str:
    return "-" if isnan(value) else small(value)


@dataclass(frozen=True)
class Check:
    """One claim about a program. ``passed`` None: it was not run, and ``note`` says why.

    ``error`` is the largest absolute difference of an output element, ``relative`` the same over the output's largest
    magnitude, ``limit`` what was allowed, ``where`` the output and the inputs it happened at.
    """

    name: str
    passed: bool | None
    error: float = nan
    relative: float = nan
    limit: float = nan
    where: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        return "not run" if self.passed is None else "pass" if self.passed else "FAIL"


@dataclass(frozen=True)
class VerifyReport:
    """``checks`` of :func:`adaptc.verify`, and the input shapes (``runs``) and ``seed`` they were made with."""

    checks: tuple[Check, ...]
    runs: tuple[str, ...]
    seed: int

    @property
    def ok(self) -> bool:
        """No check failed, and at least one was run."""
        ran = [c.passed for c in self.checks if c.passed is not None]
        return bool(ran) and all(ran)

    def __getitem__(self, name: str) -> Check:
        """The check of this name; KeyError when there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH) -> str:
        rows = [
            (c.name, c.verdict, _number(c.error), _number(c.relative), _number(c.limit), c.where or "-", c.note or "-")
            for c in self.checks
        ]
        numbers = [Column(n, right=True, keep=True) for n in ("error", "relative", "allowed")]
        columns = [Column("check", keep=True), Column("result", keep=True), *numbers, "where", "note"]
        failed = [c.name for c in self.checks if c.passed is False]
        head = "verified" if self.ok else f"NOT verified: {', '.join(failed) or 'nothing could be checked'}"
        runs = "\n".join(f"run {i}: {text}" for i, text in enumerate(self.runs, 1))
        return join(f"{head} (seed {self.seed})\n{runs}", table(columns, rows, width=width))
