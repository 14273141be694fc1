"""Results as JSON files, one for each method and task, which are written whole or not at all.

A result has the settings of its run. A run with the same settings that ended well is not run again; one that failed, or
whose file is damaged, is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import adaptc
from tests.comparison.compared import COMPARED, slug
from tests.comparison.rates import best_rate
from tests.comparison.task import RATES, SEARCH, TASKS, Plan

#: the results that the project keeps
RESULTS = Path(__file__).with_name("results")
#: distributions whose versions are in a result
_VERSIONS = ("torch", "transformers", "peft", "reasoning-gym", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """One method on one task. ``settings``: whatever its numbers depend on, but for versions and the machine."""

    task: str
    method: str
    settings: Mapping[str, Any]

    def path(self, folder: Path) -> Path:
        return folder / f"{self.task}-{slug(self.method)}.json"

    def stored(self, folder: Path) -> dict[str, Any] | None:
        """Return the result of this run where it ended well with these settings."""
        found = read_result(self.path(folder))
        same = found is not None and "error" not in found and found["settings"] == self.settings
        return found if same else None


def make_run(task: str, method: str, folder: Path, steps: int | None = None) -> Run:
    """Return the run of a method with the settings of its task, and the learning rate that the search found.

    Raises ConfigError where a rate is needed and the results in ``folder`` have none.
    """
    plan, compared = TASKS[task][0], COMPARED[method]
    settings = {
        "config": compared.config,
        "options": dict(compared.options),
        "sized_by": compared.sized_by,
        "values": list(compared.values),
        "steps": steps or plan.steps,
        "batch": plan.batch,
        "budget": plan.budget,
        "seed": plan.seed,
        "head_rate": plan.head_rate,
        "learning_rate": list(RATES) if task == SEARCH else _rate(method, plan, folder),
    }
    return Run(task, method, json.loads(json.dumps(settings)))


def applies(task: str, method: str) -> bool:
    """Return whether a method is compared on a task: those of a whole program need tokens."""
    return task == "text" or COMPARED[method].places != "program"


def _rate(method: str, plan: Plan, folder: Path) -> float:
    """Return the rate that the losses of the search speak for, for the task of ``plan``."""
    if (own := COMPARED[method].learning_rate) is not None:
        return own
    found = read_result(folder / f"{SEARCH}-{slug(method)}.json")
    losses: dict[str, float] = (found or {}).get("validation_losses", {})
    if not losses:
        raise adaptc.ConfigError(
            f"{folder} has no learning rate for {method}: run the task {SEARCH!r} first, with the same --out"
        )
    return float(f"{best_rate({float(rate): loss for rate, loss in losses.items()}) * plan.rate_factor:.2g}")


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result, or None where there is no file, or one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_result = isinstance(found, dict) and {"task", "method", "settings"} <= found.keys()
    return found if is_result else None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result aside and move it into place, so that whoever stops the run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".aside")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Return all results of a folder that can be read, in the order of their files' names."""
    return [found for path in sorted(folder.glob("*.json")) if (found := read_result(path)) is not None]


def new_result(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with what was run, the versions and the date."""
    versions = {"adaptc": adaptc.__version__}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # peft is not needed, and a task needs only some of the others
            continue
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {
        "task": run.task,
        "method": run.method,
        "settings": dict(run.settings),
        "versions": versions,
        "date": date,
        **values,
    }
