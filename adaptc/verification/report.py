"""Report a verification: one row per claim, printed as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.tables import Column, Report, Table, format_error_or_dash


@dataclass(frozen=True)
class Check:
    """A claim about a program. ``passed`` None: it was not run, and ``note`` says why.

    ``error``: the largest absolute difference of an output element. ``relative``: ``error`` over the output's largest
    magnitude. ``limit``: the largest ``error`` allowed. ``where``: the output and the run with that difference.
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


@dataclass(frozen=True, repr=False)
class VerifyReport(Report):
    """The result of :func:`adaptc.verify`: its ``checks``, with the input shapes (``runs``) and ``seed`` of the inputs.

    ``strength``: which adapters were off or scaled, in words.
    """

    ROWS = ("checks",)

    checks: tuple[Check, ...]
    runs: tuple[str, ...]
    seed: int
    strength: str = ""

    @classmethod
    def from_checks(
        cls, checks: Iterable[Check], runs: Iterable[str], seed: int, raise_on_failure: bool, strength: str = ""
    ) -> VerifyReport:
        """Return the report; with ``raise_on_failure``, raise AdaptcError unless it is ``ok``."""
        report = cls(tuple(checks), tuple(runs), seed, strength)
        if raise_on_failure and not report.ok:
            raise AdaptcError(str(report))
        return report

    @property
    def ok(self) -> bool:
        """Return whether at least one check was run, and none failed."""
        ran = [c.passed for c in self.checks if c.passed is not None]
        return bool(ran) and all(ran)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name; raise KeyError where there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def sections(self) -> list[str | Table]:
        rows = [
            (
                c.name,
                c.verdict,
                format_error_or_dash(c.error),
                format_error_or_dash(c.relative),
                format_error_or_dash(c.limit),
                c.where or "-",
                c.note or "-",
            )
            for c in self.checks
        ]
        numbers = [Column(n, right=True, no_wrap=True) for n in ("error", "relative", "allowed")]
        columns = [Column("check", no_wrap=True), Column("result", no_wrap=True), *numbers, "where", "note"]
        failed = [c.name for c in self.checks if c.passed is False]
        head = "verified" if self.ok else f"NOT verified: {', '.join(failed) or 'nothing could be checked'}"
        runs = "\n".join(f"run {i}: {text}" for i, text in enumerate(self.runs, 1))
        head += f", where {self.strength}" if self.strength else ""
        return [f"{head} (seed {self.seed})\n{runs}", Table(columns, rows)]

    def values(self) -> dict[str, Any]:
        """Return a dict of ``ok``, ``seed``, ``strength``, ``runs`` and ``checks``.

        ``passed`` is None for a check that was not run.
        """
        return {
            "ok": self.ok,
            "seed": self.seed,
            "strength": self.strength,
            "runs": list(self.runs),
            "checks": [vars(c) for c in self.checks],
        }
