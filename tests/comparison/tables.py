"""Markdown tables of results: all of a task, and a short one of both tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.comparison.compared import COMPARED, LEFT_OUT, VARIANTS_LEFT_OUT
from tests.comparison.results import applies

Result = Mapping[str, Any]

#: methods in the short table
_SHORT = 8
_HEADS = (
    *("method", "size", "rate", "parameters", "accuracy", "forgetting", "loss"),
    *("step ms", "peak MB", "file kB", "swap ms"),
)


def of_task(results: Iterable[Result], task: str) -> tuple[list[Result], list[Result]]:
    """Return the results of a task that ended well, the most accurate first, and those that failed, by name."""
    chosen = [r for r in results if r["task"] == task]
    done = [r for r in chosen if "error" not in r]
    failed = [r for r in chosen if "error" in r]
    return (
        sorted(done, key=lambda r: (-r["accuracy"], r["forgetting"], r["method"])),
        sorted(failed, key=lambda r: r["method"]),
    )


def task_table(results: Sequence[Result], task: str) -> str:
    """Return the table of a task with a line above it that says how it was run; a sentence where there is no result."""
    done, failed = of_task(results, task)
    if not done and not failed:
        return "No results yet.\n"
    rows = [_cells(r) for r in done]
    rows += [[r["method"], *[""] * (len(_HEADS) - 2), f"failed: {_one_line(r['error'])}"] for r in failed]
    table = f"{_conditions(done)}\n\n{_markdown(_HEADS, rows)}" if done else _markdown(_HEADS, rows)
    missing = not_run(results, task)
    return f"{table}\nNot run yet: {', '.join(missing)}.\n" if missing else table


def not_run(results: Iterable[Result], task: str) -> list[str]:
    """Return the methods that are compared on a task and have no result there."""
    known = {r["method"] for r in results if r["task"] == task}
    return [method for method in COMPARED if applies(task, method) and method not in known]


def left_out_list() -> str:
    """Return a list of what is not compared, with the reasons."""
    return "".join(f"- {name}: {why}.\n" for name, why in {**LEFT_OUT, **VARIANTS_LEFT_OUT}.items())


def short_table(results: Sequence[Result]) -> str:
    """Return a table of the methods that are the most accurate in the text task, with both tasks."""
    text, _ = of_task(results, "text")
    vision = {r["method"]: r for r in of_task(results, "vision")[0]}
    rows = []
    for r in text[:_SHORT]:
        other = vision.get(r["method"])
        rows.append(
            [
                r["method"],
                f"{r['parameters']:,}",
                _percent(r["accuracy"]),
                f"{r['forgetting']:+.3f}",
                _percent(other["accuracy"]) if other else "",
            ]
        )
    heads = ("method", "parameters", "text: accuracy", "text: forgetting", "vision: accuracy")
    if not rows:
        return "No results yet.\n"
    missing = len(not_run(results, "text"))
    told = f"\n{missing} of {len(COMPARED)} methods have not run on the text task yet.\n" if missing else ""
    return _markdown(heads, rows) + told


def _conditions(done: Sequence[Result]) -> str:
    """Return a sentence about the settings and the machines, all of them where they differ."""

    def said(values: Iterable[Any]) -> str:
        return " or ".join(dict.fromkeys(str(v) for v in values))

    base = done[0]
    dates = sorted({r["date"] for r in done})
    return (
        f"Without an adapter the accuracy is {_percent(base['base_accuracy'])}, and the loss on what the model knew is "
        f"{base['base_known_loss']:.3f}.\n"
        f"{said(r['settings']['steps'] for r in done)} steps of {said(r['settings']['batch'] for r in done)} rows, "
        f"a budget of {said(format(r['settings']['budget'], ',') for r in done)} parameters.\n"
        f"{said(r['machine']['cpu'] for r in done)}, {said(r['machine']['threads'] for r in done)} threads, torch "
        f"{said(r['versions']['torch'] for r in done)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def _cells(r: Result) -> list[str]:
    size = ", ".join(f"{name}={value}" for name, value in r["option"].items())
    return [
        r["method"],
        f"`{size}`" if size else "",
        f"{r['settings']['learning_rate']:g}",
        f"{r['parameters']:,}",
        _percent(r["accuracy"]),
        f"{r['forgetting']:+.3f}",
        f"{r['final_loss']:.3f}",
        f"{r['step_seconds'] * 1e3:.0f}",
        f"{r['peak_bytes'] / 1e6:.0f}",
        f"{r['file_bytes'] / 1e3:.0f}",
        f"{r['swap_seconds'] * 1e3:.1f}",
    ]


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def _one_line(text: str) -> str:
    words = " ".join(text.split()).replace("|", "\\|")
    return words if len(words) <= 160 else f"{words[:157]}..."


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *(["---:"] * (len(heads) - 1))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))
