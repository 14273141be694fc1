"""Examines transformers' model families: ``python -m tests.coverage [FAMILY | TASK ...]``.

Without names, all are examined and ``tests/coverage.md`` is written. With names, the results are printed, and
``--update`` writes them into the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.coverage.page import updated
from tests.coverage.rows import SHORT, all_rows
from tests.coverage.table import line, table
from tests.coverage.worker import Worker

PAGE = Path(__file__).resolve().parents[1] / "coverage.md"


def main() -> None:
    """Examine what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("names", nargs="*", help="families, tasks or classes; none for all")
    parser.add_argument("--short", action="store_true", help="only the families that are used most")
    parser.add_argument("--update", action="store_true", help="write the results of the names into the page")
    parser.add_argument(
        "--results", type=Path, help="a file of results, a line each; rows in it are not examined again"
    )
    arguments = parser.parse_args()
    names = {*arguments.names, *(SHORT if arguments.short else ())}
    rows = [r for r in all_rows() if not names or names & {r.family, r.task, r.model_class}]
    results: dict[str, dict[str, Any]] = {}
    if arguments.results and arguments.results.exists():
        known = [json.loads(text) for text in arguments.results.read_text(encoding="utf-8").splitlines()]
        results = {result["model_class"]: result for result in known}
    worker = Worker()
    try:
        for row in rows:
            if row.model_class in results:
                continue
            results[row.model_class] = result = worker.examine(row)
            print(line(result), flush=True)
            if arguments.results:
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    finally:
        worker.close()
    text = table([results[row.model_class] for row in rows])
    if names and arguments.update:
        found = [results[row.model_class] for row in rows]
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    elif names:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
