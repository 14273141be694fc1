"""A bank that is interrupted at any line is the one that it was, or the one that it was to become, and works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.support.gated_net import X, adapter_tensors, compile_net
from tests.support.interrupts import interrupt_at_every_line

RANKS = {"a": 2, "b": 5, "c": 3, "d": 7}
#: the files that say what a bank holds
FILES = ("/bank/bank.py", "/bank/placement.py", "/bank/stack_placement.py", "/bank/capacity.py")


class Subject:
    """A bank of two adapters, "a" used before "b", and what rows of each are."""

    def __init__(self, program: adaptc.AdaptedProgram) -> None:
        self.ready = {n: program.bind(adapter_tensors(r)).binding for n, r in RANKS.items()}
        with torch.no_grad():
            self.alone = {n: program.bind(b)(X) for n, b in self.ready.items()}
        self.bank: Any = program.bank(capacity=2, evict=True, loader=self.ready.__getitem__)

    def reset(self) -> None:
        for name in list(self.bank):
            self.bank.remove(name)
        self.bank.add("a", self.ready["a"])
        self.bank.add("b", self.ready["b"])

    def seen(self) -> list[tuple[str, list[int]]]:
        """Each adapter with its ranks, in order; all that shows them agrees."""
        names, report = list(self.bank), self.bank.report()
        assert len(self.bank) == len(names) == len(report.adapters)
        assert all(n in self.bank for n in names)
        assert list(report.adapters) == names
        assert {n for stack in report.stacks for n in stack} <= set(names)
        return [(n, report.to_dict()["adapters"][n]["ranks"]) for n in names]

    def rows(self, *names: str | None) -> None:
        with torch.no_grad():
            found = self.bank(X, adapters=list(names))
        for i, name in enumerate(names):
            if name is not None:
                torch.testing.assert_close(found[i], self.alone[self.holds(name)][i], rtol=1e-4, atol=1e-4)

    def holds(self, name: str) -> str:
        """Whose tensors are under a name."""
        (rank,) = dict(self.seen())[name]
        return next(n for n, r in RANKS.items() if r == rank)


def interrupted(subject: Subject, deed: Callable[[Any], Any]) -> int:
    def works() -> None:
        names = list(subject.bank)
        subject.rows(names[0], None, names[-1])

    return interrupt_at_every_line(lambda: deed(subject.bank), subject.reset, subject.seen, works, FILES)


def free_for_other_threads(bank: Any) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(len(list(bank))))
    thread.start()
    thread.join(20)
    assert done, "other threads wait for ever"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(compile_net(2))


@pytest.mark.long
def test_evicting_for_another(subject: Subject) -> None:
    assert interrupted(subject, lambda bank: bank.add("c", subject.ready["c"])) > 30
    free_for_other_threads(subject.bank)


@pytest.mark.long
def test_loading_what_a_call_names(subject: Subject) -> None:
    """Several are loaded for one call, and come together or not at all."""

    def call(bank: Any) -> Tensor:
        return bank(X, adapters=["c", None, "d"])

    assert interrupted(subject, call) > 60
    free_for_other_threads(subject.bank)


def test_a_loader_that_is_interrupted_loads_nothing(subject: Subject) -> None:
    def loader(name: str) -> Any:
        if name == "d":
            raise KeyboardInterrupt
        return subject.ready[name]

    subject.reset()
    old, subject.bank.loader = subject.seen(), loader
    try:
        with pytest.raises(KeyboardInterrupt):
            subject.bank(X, adapters=["c", None, "d"])
    finally:
        subject.bank.loader = subject.ready.__getitem__
    assert subject.seen() == old
    subject.rows("a", None, "b")
