"""Run methods one after another, each in a process of its own, with a progress bar.

A process that ends without a result is a result, too: its error. A keyboard interrupt ends the process under way, whose
result is then missing, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from adaptc import ConfigError
from tests.comparison.results import Run, applies, make_run, new_result, write_result
from tests.comparison.task import RATES, SEARCH, TASKS, Plan

#: the module that runs one method
WORKER = "tests.comparison.run_method"
#: variables of libraries that read the number of threads when they are imported
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

#: runs one method, with a function that is told each step
Runner = Callable[[Run, Path, int, Callable[[int], None]], None]


def run_apart(
    run: Run, folder: Path, threads: int, progress: Callable[[int], None] = lambda step: None, worker: str = WORKER
) -> None:
    """Run a method in a process of its own, which writes its result into ``folder``."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            env=environment,
            # A keyboard interrupt reaches this process alone, which then ends the other one.
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended already, and its exit status says so
                process.stdin.write(json.dumps({**asdict(run), "folder": str(folder), "threads": threads}))
                process.stdin.close()
            for line in process.stdout:
                progress(int(line))
            process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if process.returncode:
            error = f"the process ended with {process.returncode}: {_last_line(messages)}"
            write_result(run.path(folder), new_result(run, {"error": error}))


def _last_line(messages: IO[str]) -> str:
    messages.seek(0)
    lines = [line.strip() for line in messages if line.strip()]
    return lines[-1] if lines else "it said nothing"


def run_all(
    tasks: Sequence[str],
    methods: Sequence[str],
    folder: Path,
    threads: int,
    steps: int | None = None,
    runner: Runner = run_apart,
) -> None:
    """Run all methods on all tasks, but for runs whose results are there.

    A run that cannot begin, for want of a learning rate, has its error as its result.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    pairs = [(task, method) for task in tasks for method in methods if applies(task, method)]
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        all_runs = bar.add_task("all runs", total=len(pairs))
        for task, method in pairs:
            one = bar.add_task(f"{task}: {method}", total=_steps_in_all(task, steps))
            show = partial(_show_step, bar, one)
            _run_one(task, method, folder, threads, steps, runner, show)
            bar.remove_task(one)
            bar.advance(all_runs)


def _show_step(bar: Any, task: Any, step: int) -> None:
    bar.update(task, completed=step)


def _steps_in_all(task: str, steps: int | None) -> int:
    plan: Plan = TASKS[task][0]
    return (steps or plan.steps) * (len(RATES) if task == SEARCH else 1)


def _run_one(
    task: str,
    method: str,
    folder: Path,
    threads: int,
    steps: int | None,
    runner: Runner,
    progress: Callable[[int], None],
) -> None:
    try:
        run = make_run(task, method, folder, steps)
    except ConfigError as error:
        run = Run(task, method, {})
        write_result(run.path(folder), new_result(run, {"error": f"ConfigError: {error}"}))
        return
    if run.stored(folder) is None:
        runner(run, folder, threads, progress)
