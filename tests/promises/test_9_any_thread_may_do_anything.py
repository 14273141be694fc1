"""Promise 9: any thread may do anything at any time, and what it sees is all of one adapter, never a part of two.

Threads take turns at random with everything that there is to do to one program. Each result is compared with those of
the adapters by themselves; these are far apart, so what is of two adapters is near to none of them.
"""

from __future__ import annotations

import copy
import faulthandler
import random
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.passes.graph.graph_lock import GRAPH_LOCK
from tests.support.gated_net import X, adapter_tensors, compile_net, config, net
from tests.support.turns import PATIENCE, Turns

RANKS = (2, 7, 3)
#: of adapter values: so large that the outputs are far apart
SIZE = 3.0


@dataclass
class Stage:
    """One program, its adapters in every form there is, and what each of them computes."""

    program: adaptc.AdaptedProgram
    bindings: list[Any]
    folders: list[Path]
    outputs: list[Tensor]
    base: Tensor
    scratch: Path
    done: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, scratch: Path, backend: str) -> Stage:
        program = compile_net(4, backend=backend)
        bindings, folders, outputs = [], [], []
        for rank in RANKS:
            adaptc.swap(program, adapter_tensors(rank, SIZE), config=config(rank))
            bindings.append(program.binding)
            folders.append(adaptc.save_adapter(program, scratch / f"rank{rank}"))
            outputs.append(program(X))
        with torch.no_grad():
            return cls(program, bindings, folders, outputs, net()(X), scratch)

    def adapter(self, out: Tensor) -> int:
        """Which adapter an output is of."""
        found = [i for i, o in enumerate(self.outputs) if torch.allclose(out, o, rtol=1e-4, atol=1e-4)]
        assert len(found) == 1, f"an output of no adapter: {out}, expected one of {self.outputs}"
        return found[0]


def calls(s: Stage, rng: random.Random) -> None:
    s.adapter(s.program(X))


def swaps_a_binding(s: Stage, rng: random.Random) -> None:
    adaptc.swap(s.program, rng.choice(s.bindings))


def swaps_a_folder(s: Stage, rng: random.Random) -> None:
    adaptc.swap(s.program, rng.choice(s.folders))


def binds(s: Stage, rng: random.Random) -> None:
    i = rng.randrange(len(RANKS))
    bound = s.program.bind(s.folders[i], form=rng.choice(["apply", "weight", "auto"]))
    assert s.adapter(bound(X)) == i


def runs_the_base(s: Stage, rng: random.Random) -> None:
    torch.testing.assert_close(s.program.base(X), s.base)


def merges(s: Stage, rng: random.Random) -> None:
    merged = adaptc.merge(s.program)
    i = s.adapter(merged(X))
    assert s.adapter(adaptc.unmerge(merged)(X)) == i
    assert str(merged.merge_report)


def unloads(s: Stage, rng: random.Random) -> None:
    torch.testing.assert_close(adaptc.unload(s.program)(X), s.base)


def saves(s: Stage, rng: random.Random) -> None:
    path = adaptc.save(s.program, s.scratch / f"{rng.random()}.pt2")
    s.adapter(adaptc.load(path)(X))
    path.unlink()


def saves_the_adapter(s: Stage, rng: random.Random) -> None:
    folder = adaptc.save_adapter(s.program, s.scratch / f"{rng.random()}")
    s.adapter(s.program.bind(folder)(X))


def takes_the_module(s: Stage, rng: random.Random) -> None:
    with torch.no_grad():
        s.adapter(s.program.module()(X))


def copies(s: Stage, rng: random.Random) -> None:
    made = rng.choice([copy.copy, copy.deepcopy])(s.program)
    i = s.adapter(made(X))
    assert s.adapter(made(X)) == i, "another thread swapped a copy"


def looks(s: Stage, rng: random.Random) -> None:
    assert "LORA" in str(adaptc.report(s.program))
    assert "AdaptedProgram" in repr(s.program) or "ExportedProgram" in repr(s.program)
    assert len(s.program.state_dict) == 6 + 3 * 3
    s.program.graph.lint()
    assert s.program.held.count >= 0
    assert s.program.fusion.groups in (0, 1)
    assert s.program.passes["program"]


def sets_options(s: Stage, rng: random.Random) -> None:
    s.program.fuse = rng.random() < 0.5


def compiles(s: Stage, rng: random.Random) -> None:
    other = adaptc.compile(net(), LoraConfig(r=2, target_modules=["up"]), example_inputs=torch.randn(2, 5))
    torch.testing.assert_close(other(X), s.base)


def verifies(s: Stage, rng: random.Random) -> None:
    report = adaptc.verify(s.program, net())
    assert report.ok, str(report)


Deed = Callable[[Stage, random.Random], None]
#: what threads do, and how often
DEEDS: dict[Deed, int] = {
    calls: 40,
    swaps_a_binding: 12,
    swaps_a_folder: 12,
    binds: 8,
    runs_the_base: 4,
    merges: 4,
    unloads: 1,
    saves: 2,
    saves_the_adapter: 3,
    takes_the_module: 3,
    copies: 4,
    looks: 3,
    sets_options: 1,
    compiles: 1,
    verifies: 1,
}


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns a hundred times as often as they would."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(old)


def everything_at_once(
    stage: Stage, seconds: float, threads: int, deeds: dict[Deed, int], seed: int, calls: int = 0, all_turns: int = 0
) -> None:
    """Until the seconds are over, and there were more ``calls`` and ``all_turns`` than this."""
    faults: list[str] = []
    turns = Turns(seconds, lambda: stage.done["calls"] > calls and sum(stage.done.values()) > all_turns)

    def work(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        while turns.go_on() and not faults:
            deed = rng.choices(list(deeds), list(deeds.values()))[0]
            try:
                deed(stage, rng)
            except BaseException:
                faults.append(f"{deed.__name__}: {traceback.format_exc()}")
            stage.done[deed.__name__] += 1

    pool = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(threads)]
    with switching_often():
        for t in pool:
            t.start()
        for t in pool:
            t.join(seconds + 2 * PATIENCE)
    assert not faults, faults[0]
    if any(t.is_alive() for t in pool):
        faulthandler.dump_traceback(sys.__stderr__)
        raise AssertionError("threads wait for each other")


@pytest.mark.long
def test_threads_see_whole_adapters(tmp_path: Path) -> None:
    stage = Stage.of(tmp_path, "eager")
    everything_at_once(stage, 15, 6, DEEDS, seed=1, calls=10, all_turns=30)
    assert stage.done["calls"] > 10
    assert sum(stage.done.values()) > 30


@pytest.mark.long
def test_threads_that_only_call_and_swap(tmp_path: Path) -> None:
    """Calls and swaps alone come to many more turns."""
    stage = Stage.of(tmp_path, "eager")
    few = {d: n for d, n in DEEDS.items() if d in (calls, swaps_a_binding, swaps_a_folder, copies, runs_the_base)}
    everything_at_once(stage, 5, 4, few, seed=2, calls=50)
    assert stage.done["calls"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("seed", [3, 4])
def test_threads_see_whole_adapters_for_long(backend: str, seed: int, tmp_path: Path) -> None:
    stage = Stage.of(tmp_path, backend)
    deeds = {d: n for d, n in DEEDS.items() if backend == "eager" or d is not sets_options}
    everything_at_once(stage, 150, 6, deeds, seed)


def test_calls_and_swaps_do_not_wait_for_work_on_graphs(tmp_path: Path) -> None:
    """While a thread compiles, or saves, for minutes, others go on: with adapters of any rank, in any form."""
    stage = Stage.of(tmp_path, "eager")
    stage.program(X)
    tensors = adapter_tensors(5, SIZE)  # of a rank that the program has not had
    done: list[int] = []

    def serve() -> None:
        for adapter in (*stage.bindings, *stage.folders, tensors, {k: t.clone() for k, t in tensors.items()}):
            adaptc.swap(stage.program, adapter)
            stage.program(X)
            stage.program.bind(adapter)(X)
            done.append(1)

    with GRAPH_LOCK:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), f"it waits, after {len(done)} adapters"
    assert len(done) == 2 * len(RANKS) + 2
