"""A bank that is interrupted at any line is the one that it was, or the one that it was to become, and works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bank.kinds import Kind, close, kinds, third_adapter
from tests.support.interrupts import interrupt_at_every_line

#: the files that say what a bank holds
FILES = (
    "/bank/bank.py",
    "/bank/placement.py",
    "/bank/stack_placement.py",
    "/bank/capacity.py",
    "/packages/package_placement.py",
    "/packages/packaged_program.py",
    "/packages/constants.py",
)
#: deed -> how many lines it has at least; where no place is free nothing can be added
DEEDS = [("add", False, 20), ("replace", False, 20), ("replace", True, 20), ("remove", False, 5), ("remove", True, 5)]


@pytest.mark.long
@pytest.mark.few(4)
@kinds("call")
@pytest.mark.parametrize(("deed", "full", "lines"), DEEDS, ids=str)
def test_an_interrupt_at_any_line_leaves_the_old_or_the_new_adapters(
    kind: Kind, deed: str, full: bool, lines: int
) -> None:
    """In a place that is free, and, where none is, in the one of the adapter that goes."""
    bank = kind.bank()
    given = {**kind.adapters, "third": third_adapter(kind), "new": kind.adapters["second"]}
    ready = {n: replace(kind.source.bind(a, scale=0.5).binding, source=f"of {n}") for n, a in given.items()}
    alone = {b.source: kind.of_one(kind.source.bind(b)) for b in ready.values()}
    alone["the base"] = kind.alone(None)
    held = ("first", "second", "third") if full else ("first", "second")

    def reset() -> None:
        for name in list(bank):
            bank.remove(name)
        for name in held:
            bank.add(name, ready[name])

    def seen() -> list[tuple[str, str]]:
        """All that shows what a bank holds agrees."""
        report = bank.report()
        assert list(report.adapters) == list(bank)
        assert len(bank) == len(report.adapters)
        assert all(name in bank for name in report.adapters)
        assert {n for stack in report.stacks for n in stack} <= set(bank)
        return [(n, b.source) for n, b in report.adapters.items()]

    def works() -> None:
        now: dict[str | None, str] = {**dict(seen()), None: "the base"}
        names = [*bank, None, None, None][:4]
        close(kind.rows(bank, names), [alone[now[name]][row] for row, name in enumerate(names)])

    deeds = {
        "add": lambda: bank.add("new", ready["new"]),
        "replace": lambda: bank.replace("first", ready["new"]),
        "remove": lambda: bank.remove("first"),
    }
    assert interrupt_at_every_line(deeds[deed], reset, seen, works, FILES) >= lines
