"""Report how the configs of a sweep did, as a table and as a picture of their losses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adaptc.errors import AdaptcError
from adaptc.pictures.curve_picture import Panel, draw_curves
from adaptc.pictures.draw import check_picture_path, write_picture
from adaptc.pictures.themes import THEMES
from adaptc.tables import Column, Report, Table, format_bytes


class SweepPoint(NamedTuple):
    """The loss and the evaluation of one config at ``step``; None where there was none."""

    step: int
    loss: float | None
    eval_loss: float | None = None


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
    """A report of a sweep, with a :class:`SweepResult` for each config.

    ``step`` of ``steps`` are done. ``points``: name -> the losses of each step so far.
    """

    ROWS = ("configs",)
    ROW_NAME = "config"

    results: Mapping[str, SweepResult]
    step: int
    steps: int
    points: Mapping[str, tuple[SweepPoint, ...]] = field(default_factory=dict[str, tuple[SweepPoint, ...]])

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

    def draw(self, path: str | os.PathLike[str], theme: Literal["light", "dark"] = "light") -> Path:
        """Draw the losses of all configs, and below them their evaluations, into an SVG or PNG file.

        Args:
            path: the file, which ends in ``.svg`` or ``.png``.
            theme: "light" or "dark", the page that the picture is for.

        Returns:
            the path.

        Raises:
            ConfigError: matplotlib is not installed, or an option has a value that is none.
            CheckpointError: the file cannot be written; what was there before is unchanged.
            AdaptcError: no step was taken.
        """
        target = check_picture_path(path, theme)
        panels = [Panel("loss", self._curves("loss")), Panel("eval loss", self._curves("eval_loss"))]
        panels = [p for p in panels if any(p.curves.values())]
        if not panels:
            raise AdaptcError("the sweep has taken no step, so it has no losses to draw")
        title = f"{len(self.results)} configs after {self.step} of {self.steps} steps"
        return write_picture(draw_curves(title, panels, self.best, THEMES[theme]), target)

    def _curves(self, what: str) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for name in self.results:
            values = [(p.step, getattr(p, what)) for p in self.points.get(name, ())]
            found[name] = [(float(step), v) for step, v in values if v is not None and isfinite(v)]
        return found
