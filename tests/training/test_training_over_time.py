"""Adapters that are added, trained, removed, saved and loaded in any order are as if each was trained alone."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from tests.support.gated_net import SITES
from tests.training.alone import Alone, assert_equal, batch, config, loss, program

NAMES = ("a", "b", "c", "d")
PROGRAM = program()
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda lr: lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.3),
    "sgd": lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.8),
}


class Training(RuleBasedStateMachine):
    """A bank, and each of its adapters trained alone."""

    saved = Bundle("saved")

    @initialize()
    def begin(self) -> None:
        self.bank: Any = PROGRAM.bank(training=True, capacity=3)
        self.alone: dict[str, Alone] = {}
        self.options: dict[str, tuple[int, dict[str, Any]]] = {}
        self.pending: set[str] = set()
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.sampled_from([1, 3, 5]),
        layers=st.sets(st.sampled_from(list(SITES)), min_size=1),
        kind=st.sampled_from(list(OPTIMIZERS)),
        lr=st.sampled_from([1e-3, 5e-2]),
        clip=st.sampled_from([None, 0.01]),
    )
    def add(self, name: str, rank: int, layers: set[str], kind: str, lr: float, clip: float | None) -> None:
        if name in self.alone or len(self.alone) == 3:
            return
        options = {"optimizer": OPTIMIZERS[kind](lr), "max_grad_norm": clip}
        self.bank.add(name, config(rank, sorted(layers)), seed=rank, **options)
        self.options[name] = rank, options
        self.alone[name] = Alone(self.bank[name], rank, options["optimizer"], clip=clip)

    @precondition(lambda self: self.alone)
    @rule(data=st.data(), rows=st.integers(1, 6))
    def train(self, data: st.DataObject, rows: int) -> None:
        names = data.draw(st.lists(st.sampled_from([*self.alone, None]), min_size=rows, max_size=rows))
        if not any(names):
            return
        self.count += 1
        x, target = batch(rows, self.count)
        found = self.bank.forward_backward(x, names, loss, target)
        for name in {n for n in names if n is not None}:
            own = [i for i, n in enumerate(names) if n == name]
            want = self.alone[name].backward(x[own], target[own])
            torch.testing.assert_close(found[name].value(), want, rtol=1e-9, atol=1e-9)
            self.pending.add(name)

    @precondition(lambda self: self.pending)
    @rule()
    def step(self) -> None:
        assert set(self.bank.step()) == self.pending
        for name in self.pending:
            self.alone[name].step()
        self.pending.clear()

    @precondition(lambda self: self.alone)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alone)))
        self.bank.remove(name)
        del self.alone[name]
        self.pending.discard(name)

    @precondition(lambda self: self.alone)
    @rule(target=saved, data=st.data())
    def save(self, data: st.DataObject) -> Any:
        name = data.draw(st.sampled_from(sorted(self.alone)))
        self.count += 1
        path = self.bank.save_state(name, Path(self.folder.name) / str(self.count))
        alone = self.alone[name]
        frozen = copy.deepcopy(({k: t.detach() for k, t in alone.parameters.items()}, alone.optimizer.state_dict()))
        return path, self.options[name], frozen, alone.steps

    @rule(name=st.sampled_from(NAMES), one=consumes(saved))
    def load(self, name: str, one: Any) -> None:
        path, (rank, options), (values, state), steps = one
        if name in self.alone or len(self.alone) == 3:
            return
        self.bank.load_state(name, path, **options)
        self.options[name] = rank, options
        alone = Alone(self.bank[name], rank, options["optimizer"], clip=options["max_grad_norm"])
        with torch.no_grad():
            for key, t in alone.parameters.items():
                t.copy_(values[key])
        alone.optimizer.load_state_dict(state)
        alone.steps = steps
        self.alone[name] = alone

    @invariant()
    def adapters_are_as_alone(self) -> None:
        assert set(getattr(self, "bank", ())) == set(getattr(self, "alone", ()))
        for name, alone in getattr(self, "alone", {}).items():
            assert_equal(self.bank, name, alone)

    def teardown(self) -> None:
        self.folder.cleanup()


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
