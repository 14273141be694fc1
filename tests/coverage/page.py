"""Brings the page up to date with the results of some classes, without examining the others again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tests.coverage.table import STATUSES, all_rows_table, exceptions_table

_EXCEPTIONS, _ALL = "## What is not plainly equal\n", "## All rows\n"
_COUNT = re.compile(r"\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| .*\n")


def updated(page: str, results: Iterable[dict[str, Any]]) -> str:
    """Return the page with these results in place of what it says of their classes.

    Raises ValueError for a class that it does not list. How many models PEFT adapts stays as it is: that does not
    depend on adaptc.
    """
    new = {r["model_class"]: r for r in results}
    head, rest = page.split(_EXCEPTIONS)
    exceptions, everything = rest.split(_ALL)
    rows = _body(everything)
    if lost := [name for name in new if name not in {_cells(row)[1] for row in rows}]:
        raise ValueError(f"the page lists no class {lost[0]!r}: examine all of them")
    kept = [_body(all_rows_table([new[n]]))[0] if (n := _cells(row)[1]) in new else row for row in rows]
    told = _with_new_exceptions(_body(exceptions), [_cells(row) for row in rows], new)
    found = [_cells(row) for row in kept]
    head = _COUNT.sub(lambda m: _count_line(m, found), head)
    return f"{head}{_EXCEPTIONS}{_with_body(exceptions, told)}{_ALL}{_with_body(everything, kept)}"


def _with_new_exceptions(lines: list[str], rows: list[list[str]], new: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of exceptions with those of new results at their places, in the order of all rows."""
    order = {(task, family): i for i, (family, _, task, *_) in reversed([*enumerate(rows)])}
    classes: dict[tuple[str, str], list[str]] = {}
    for family, name, task, *_ in rows:
        classes.setdefault((task, family), []).append(name)
    # Of a family with several classes in a task, the page does not say which line is whose.
    whole = {key for key, names in classes.items() if all(name in new for name in names)}
    kept = [line for line in lines if (_cells(line)[0], _cells(line)[1]) not in whole]
    made = [line for r in new.values() if (r["task"], r["family"]) in whole for line in _body(exceptions_table([r]))]
    return sorted([*kept, *made], key=lambda line: order[_cells(line)[0], _cells(line)[1]])


def _count_line(match: re.Match[str], rows: list[list[str]]) -> str:
    task, classes, run, adapted = match.groups()
    of = [r for r in rows if task in (r[2], "all")]
    counts = [sum(r[3] == status for r in of) for status in STATUSES]
    generating = [r[5] for r in of if r[5] and r[3] != "does not run"]
    equal = f"{sum(g == 'equal' for g in generating)} of {len(generating)}" if generating else ""
    return f"| {' | '.join(map(str, [task, classes, run, adapted, *counts, equal]))} |\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _body(table: str) -> list[str]:
    """Return the lines of a table below its head."""
    return table.strip().splitlines()[2:]


def _with_body(table: str, lines: list[str]) -> str:
    """Return the table with other lines below its head, and what stands around it."""
    before, after = table[: len(table) - len(table.lstrip())], table[len(table.rstrip()) :]
    return before + "\n".join([*table.strip().splitlines()[:2], *lines]) + after
