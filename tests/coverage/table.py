"""Writes the results as markdown: counts by task, the rows that are not plainly equal, and all rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.coverage.rows import TASKS

#: what becomes of a row that runs
STATUSES = {
    "equal": "adaptc's outputs are PEFT's at both sizes",
    "no effect": "equal, but the adapter does not change the output, so this shows nothing",
    "idle layers": "equal without the layers that the model never calls, whose adapters adaptc refuses",
    "runs without PEFT": "PEFT cannot adapt the model; adaptc adapts it at both sizes",
    "one size": "equal at one size, and an error of adaptc at the other",
    "refused": "an error of adaptc",
    "differs": "other numbers than PEFT's",
    "foreign error": "an error that is not adaptc's",
    "too slow": "no result in time",
    "crash": "the process ended",
}
#: characters of a reason that the page shows
_LONGEST = 200
_HEAD = """# Families of transformers

`python -m tests.coverage` writes this page. It builds a tiny random model of each class in transformers' auto mappings,
adapts all its linear layers with a LoRA, by PEFT and by adaptc, and compares the outputs at two sizes. A class is
examined once, in the first task that has it.
"""


def line(result: dict[str, Any]) -> str:
    """Return a result as a line of text."""
    generation = (
        f" | generation {result['generation']} {result.get('generation_reason', '')}"
        if result.get("generation")
        else ""
    )
    return (
        f"{result['family']} {result['task']} {result['model_class']}: {result['status']} {result['reason']}"
        f"{generation} | {result.get('seconds', 0)} s {'; '.join(result.get('notes', []))}"
        f"{' | PEFT: ' + result['peft'] if result.get('peft') else ''}"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return the page of all results."""
    results = sorted(results, key=lambda r: (TASKS.index(r["task"]), r["family"], r["model_class"]))
    parts = [
        _HEAD,
        "## Counts\n",
        _counts(results),
        _words(),
        "## What is not plainly equal\n",
        exceptions_table(results),
    ]
    parts += ["## All rows\n", all_rows_table(results)]
    return "\n".join(parts)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *([str(c).replace("|", "\\|") for c in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _counts(results: list[dict[str, Any]]) -> str:
    rows = []
    for task in (*TASKS, "all"):
        of = [r for r in results if task in (r["task"], "all")]
        if not of:
            continue
        ran = [r for r in of if r["status"] != "does not run"]
        count = [sum(r["status"] == s for r in of) for s in STATUSES]
        generating = [r["generation"] for r in ran if r.get("generation")]
        equal = f"{sum(g == 'equal' for g in generating)} of {len(generating)}" if generating else ""
        rows.append([task, len(of), len(ran), sum(not r.get("peft") for r in ran), *count, equal])
    return _markdown(["task", "classes", "run", "PEFT adapts", *STATUSES, "generation equal"], rows)


def _words() -> str:
    return "\n" + "".join(f"- {status}: {meaning}.\n" for status, meaning in STATUSES.items())


def exceptions_table(results: list[dict[str, Any]]) -> str:
    """Return the rows that are not plainly equal, with the reasons."""
    rows = []
    for r in results:
        generates = r.get("generation", "") in ("", "equal")
        notes = [note for note in r.get("notes", []) if not note.startswith("inputs given")]
        if r["status"] == "equal" and generates and not notes:
            continue
        why = [r["reason"][:_LONGEST], f"PEFT: {r['peft'][:_LONGEST]}" if r.get("peft") else "", *notes]
        if not generates:
            why.append(f"generation {r['generation']}: {r['generation_reason'][:_LONGEST]}")
        rows.append([r["task"], r["family"], r["status"], "; ".join(w for w in why if w)])
    return _markdown(["task", "family", "status", "reason"], rows)


def all_rows_table(results: list[dict[str, Any]]) -> str:
    """Return all rows."""
    sizes = {"equal": "both", "idle layers": "both", "runs without PEFT": "both", "one size": "one"}
    rows = [
        (*(r[key] for key in ("family", "model_class", "task", "status")), sizes.get(r["status"], ""), *_last(r))
        for r in results
    ]
    return _markdown(["family", "class", "task", "status", "sizes free", "generation", "capture seconds"], rows)


def _last(result: dict[str, Any]) -> tuple[Any, Any]:
    return result.get("generation", ""), result.get("seconds") or ""
