"""Compares methods: ``python -m tests.comparison``.

Runs whose results are there are left out, so a run that was stopped goes on. Afterwards the tables and the picture are
written: for the project's own results those of the guide and the README, for another ``--out`` into that folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from adaptc import AdaptcError
from tests.comparison.compared import COMPARED
from tests.comparison.publish import publish
from tests.comparison.results import RESULTS
from tests.comparison.runs import run_all
from tests.comparison.task import TASKS


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return what the command line says; exit with a message for a name that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m tests.comparison", description=__doc__)
    parser.add_argument("--task", choices=["all", *TASKS], default="all", help="one task; all by default")
    parser.add_argument("--methods", default=",".join(COMPARED), help="names with commas between; all by default")
    parser.add_argument("--steps", type=_positive, help="training steps, in place of those of the task; needs --out")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="by default one for each core")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables and the picture")
    parsed = parser.parse_args(arguments)
    by_name = {name.lower(): name for name in COMPARED}
    asked = [name.strip().lower() for name in parsed.methods.split(",")]
    if unknown := [name for name in asked if name not in by_name]:
        parser.error(f"no methods of these names: {', '.join(unknown)}. There are: {', '.join(COMPARED)}")
    if parsed.steps and parsed.out.resolve() == RESULTS.resolve():
        parser.error("--steps makes other results than those that the project keeps: give --out, too")
    parsed.methods = [by_name[name] for name in asked]
    return parsed


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    asked = parse(arguments)
    try:
        if not asked.report:
            tasks = [*TASKS] if asked.task == "all" else [asked.task]
            run_all(tasks, asked.methods, asked.out, asked.threads, asked.steps)
        for path in publish(asked.out):
            print(path)
    except AdaptcError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
