"""Keep the state of a sweep in a directory, so that a run that was stopped goes on.

``sweep.json`` names the folder with the newest complete state of all configs. A new state goes to a new folder first,
so a run that ends while it writes leaves the state before. Beside them each config has a directory, with the adapter of
its best evaluation.

A run holds the lock of the file ``.lock``, which ends with its process. So no two runs write to one directory at once,
and a run that was killed leaves it free.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.adapter_files.locate import check_plain_name
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.joint_training.sweep_report import SweepPoint, SweepResult
from adaptc.value_types import InvalidValue, field_rules

STATE_NAME, LOCK_NAME = "sweep.json", ".lock"
#: theme -> the picture of the losses, which the command writes
PICTURE_NAMES: Mapping[Any, str] = {"light": "curves.svg", "dark": "curves-dark.svg"}
#: the beginning of the names of folders with the state of all configs
_STATES_PREFIX = "state-"


@dataclass(frozen=True)
class SweepState:
    """A state of a run after ``step`` steps, by the names of configs.

    ``folder`` has the states of their training. ``since_best``: how many evaluations ago the best was.
    """

    step: int
    folder: Path
    results: Mapping[str, SweepResult]
    since_best: Mapping[str, int]
    points: Mapping[str, tuple[SweepPoint, ...]]


class SweepDirectory:
    """The directory ``path`` of a run that ``description`` describes: what must be the same for a run to go on."""

    def __init__(self, path: Path, names: list[str], description: Mapping[str, Any]) -> None:
        for name in names:
            check_plain_name(name, "the name of a config, which is that of its directory,")
            if name in (STATE_NAME, LOCK_NAME, *PICTURE_NAMES.values()) or name.startswith(_STATES_PREFIX):
                raise ConfigError(f"{name!r} is what a sweep calls its own files in the directory: choose another name")
        self.path, self._names = path, names
        self._description = json.loads(json.dumps(description, default=str))

    @contextmanager
    def held(self, is_new: bool) -> Generator[None]:
        """Run the block with the directory, and no other run in it. Where it ``is_new``, it is made.

        Raises ConfigError where another run is in it, or has made it meanwhile, and CheckpointError where it cannot be
        written.
        """
        taken = ConfigError(f"another sweep runs in {self.path} now: wait until it ends, or give another directory")
        lock = FileLock(self.path / LOCK_NAME)
        with explain_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise taken from None
        try:
            if is_new and (self.path / STATE_NAME).exists():
                raise taken
            yield
        finally:
            lock.release()

    def read(self) -> SweepState | None:
        """Return the state that is there; None where there is none.

        Raises CheckpointError for the state of another run, and for a damaged one.
        """
        path = self.path / STATE_NAME
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            theirs, made = dict(state["description"]), self._read(state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): remove the directory to begin anew") from error
        own = self._description
        if wrong := [k for k in {**own, **theirs} if own.get(k) != theirs.get(k)]:
            raise CheckpointError(
                f"{path} is of a sweep with other {wrong[0]}: give the same to go on, or another directory"
            )
        if made is None:
            raise CheckpointError(f"{path} is damaged: it has not the configs that it describes. Remove the directory")
        return made

    def _read(self, state: Any) -> SweepState | None:
        """Return the state in the content of the file; None where it is not of the same configs."""
        results = {n: _read_result(r) for n, r in state["results"].items()}
        points = {n: tuple(SweepPoint(*p) for p in all_) for n, all_ in state["points"].items()}
        since, step, name = dict(state["since_best"]), state["step"], state["states"]
        if not all(type(n) is int and n >= 0 for n in (step, *since.values())):
            raise ValueError("a number of steps is no whole number")
        folder = self.path / check_plain_name(name, "the folder of states")
        if any(set(found) != set(self._names) for found in (results, points, since)):
            return None
        return SweepState(step, folder, results, since, points)

    def write(self, state: SweepState, save: Callable[[str, Path], Any]) -> None:
        """Write ``state`` with what ``save`` writes of each config that goes on, then remove the older states.

        Raises CheckpointError where the place cannot be written, and then the older state is there.
        """
        new = self.path / f"{_STATES_PREFIX}{state.step}"
        with explain_write_errors(self.path):
            shutil.rmtree(new, ignore_errors=True)  # of a run that ended while it wrote
            new.mkdir(parents=True)
            for name, result in state.results.items():
                if not result.stopped:
                    save(name, new / name)
            content = {
                "description": self._description,
                "step": state.step,
                "states": new.name,
                "results": {n: asdict(r) for n, r in state.results.items()},
                "since_best": dict(state.since_best),
                "points": {n: [[p.step, p.loss, p.eval_loss] for p in all_] for n, all_ in state.points.items()},
            }
            with atomic_replace(self.path / STATE_NAME) as path:
                path.write_text(json.dumps(content), encoding="utf-8")
        for old in self.path.glob(f"{_STATES_PREFIX}*"):
            if old != new:
                shutil.rmtree(old, ignore_errors=True)


def _read_result(fields: Mapping[str, Any]) -> SweepResult:
    """Return the result with these fields. Raises TypeError or ValueError for a value of another kind."""
    made = SweepResult(**fields)
    for name, rule in field_rules(SweepResult).items():
        value = getattr(made, name)
        try:
            rule.check(0.0 if isinstance(value, float) else value)  # an evaluation need not be finite
        except InvalidValue as error:
            raise ValueError(f"{name} is {short_repr(value)}") from error
    return made
