"""Report how the configs of a sweep did, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptc.tables import Column, Report, Table, format_bytes


@dataclass(frozen=True)
class SweepResult:
    """The result of one config so far.

    ``steps``: how many steps it took, and ``skipped_steps`` how many were left out for values that are not finite.
    ``loss``: of its last batch. ``eval_loss``: of its last evaluation. ``best`` and ``best_step``: the best evaluation.
    ``step_seconds``: the median of its share of a step. ``bytes``: of the adapter with gradients and moments.
    ``stopped``: whether it stopped early.
    """

    name: str
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    best: float | None = None
    best_step: int | None = None
    step_seconds: float | None = None
    bytes: int = 0
    skipped_steps: int = 0
    stopped: bool = False


@dataclass(frozen=True, repr=False)
class SweepReport(Report):
    """A report of a sweep, with a :class:`SweepResult` for each config. ``step`` of ``steps`` are done."""

    ROWS = ("configs",)
    ROW_NAME = "config"

    results: Mapping[str, SweepResult]
    step: int
    steps: int

    @property
    def best(self) -> str | None:
        """Return the name of the config with the best evaluation; None before the first."""
        known = {n: r.best for n, r in self.results.items() if r.best is not None}
        return min(known, key=known.__getitem__) if known else None

    def sections(self) -> Iterable[str | Table]:
        best = "" if self.best is None else f"; the best is {self.best!r} with {self.results[self.best].best:.4f}"
        yield f"{len(self.results)} configs after step {self.step} of {self.steps}{best}"
        columns = ["config", *(Column(n, True) for n in ("steps", "loss", "eval loss", "best", "step", "memory")), ""]
        yield Table(columns, [self._row(r) for r in self.results.values()])

    def _row(self, r: SweepResult) -> tuple[Any, ...]:
        losses = ["-" if v is None else f"{v:.4f}" for v in (r.loss, r.eval_loss, r.best)]
        seconds = "-" if r.step_seconds is None else f"{r.step_seconds * 1e3:.0f} ms"
        notes = ["stopped early"] * r.stopped + [f"{r.skipped_steps} steps skipped"] * bool(r.skipped_steps)
        return r.name, r.steps, *losses, seconds, format_bytes(r.bytes), ", ".join(notes)

    def values(self) -> dict[str, Any]:
        configs = {n: {k: v for k, v in asdict(r).items() if k != "name"} for n, r in self.results.items()}
        return {"step": self.step, "steps": self.steps, "best": self.best, "configs": configs}
