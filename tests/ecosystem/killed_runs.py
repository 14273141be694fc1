"""Runs of Trainer that are killed, and others that go on from what they left; started by ``test_killed_runs``.

Arguments: a folder, a number that what is random follows from, and how many runs are killed. One process imports what
all need, and each run is a copy of it. Writes ``found.json``: the losses of the run that nobody killed, and of each
other what it left, what Trainer makes of that by itself, and its losses.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer  # noqa: F401  # imported once, and not in each run
from transformers.trainer_utils import get_last_checkpoint

import adaptc
from tests.support.training import first_values, module, train

RUN: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


def child(function: Callable[[], Any], result: Path) -> int:
    """Another process that runs ``function`` and writes what it gives."""
    pid = os.fork()
    if pid:
        return pid
    try:
        found = function()
        result.write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def losses_of(folder: Path, resume: Any = None) -> list[float]:
    return train(module(), folder, resume=resume, **RUN)[0]


def killed(folder: Path, dead: Callable[[float], bool]) -> None:
    """A run of which ``dead`` of the seconds it has run says when to kill it."""
    folder.mkdir()
    pid, start = child(lambda: losses_of(folder), folder / "not killed.json"), time.monotonic()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if dead(time.monotonic() - start):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return


def goes_on(folder: Path) -> dict[str, Any]:
    newest, last = get_last_checkpoint(str(folder)), adaptc.training.last_checkpoint(folder)
    refused = None
    if newest != last:
        try:
            refused = f"went on: {losses_of(folder, resume=True)}"
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
    left = sorted(p.name for p in Path(newest).iterdir()) if newest else []
    return {"left": left, "last": last, "refused": refused, "losses": _rest(folder, last)}


def _rest(folder: Path, last: str | None) -> list[float]:
    """The losses of the whole run, the rest of which is done now. One that was done already is left alone: Trainer
    would take a step more than it is told to."""
    if last is not None and last.endswith(f"-{RUN['max_steps']}"):
        history = json.loads((Path(last) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    return losses_of(folder, resume=last)


def moments(folder: Path, rng: random.Random, seconds: float) -> list[Callable[[float], bool]]:
    """When to kill: at a random moment, when a folder appears, when a file is in it."""
    after, step = rng.uniform(0.3, 1.0) * seconds, 2 * rng.randint(2, 3)
    where = folder / f"checkpoint-{step}"
    files = ["adapter_model.safetensors", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
    there = where / rng.choice(files)
    return [lambda passed: passed > after, lambda _: where.exists(), lambda _: there.exists()]


def main(folder: Path, seed: int, count: int) -> None:
    torch.set_num_threads(1)
    first_values()
    rng, start = random.Random(seed), time.monotonic()
    os.waitpid(child(lambda: losses_of(folder / "whole"), folder / "whole.json"), 0)
    seconds, found = time.monotonic() - start, []
    for i in range(count):
        run = folder / f"run{i}"
        killed(run, moments(run, rng, seconds)[i % 3])
        os.waitpid(child(lambda run=run: goes_on(run), folder / "one.json"), 0)
        found.append(json.loads((folder / "one.json").read_text()))
        (folder / "one.json").unlink()
    whole = json.loads((folder / "whole.json").read_text())
    (folder / "found.json").write_text(json.dumps({"whole": whole, "runs": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
