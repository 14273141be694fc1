"""Nothing is left behind: what is done again and again leaves a process as large as it was."""

from __future__ import annotations

import copy
import gc
import linecache
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.passes.graph.torch_caches import drop_dead_code
from adaptc.runtime import weight_buffers
from tests.support.gated_net import X, adapter_tensors, compile_net, config, net

CONFIG = config(3, init_lora_weights=False)


def objects() -> Counter[str]:
    """All that the garbage collector knows, by type, and the texts of generated code."""
    drop_dead_code(force=True)
    weight_buffers.forget_dead_tensors()
    gc.collect()
    found = Counter(type(o).__name__ for o in gc.get_objects())
    return found | Counter(texts=sum(name.startswith("<eval_with_key>") for name in linecache.cache))


class Deeds:
    """What a process may do for weeks, to one program."""

    def __init__(self, folder: Path) -> None:
        self.net, self.count = net(), 0
        self.program = compile_net(3)
        self.file = adaptc.save(self.program, folder / "p.pt2")
        self.adapter = adaptc.save_adapter(self.program, folder / "adapter")

    def compiling(self) -> None:
        adaptc.compile(self.net, CONFIG, example_inputs=torch.randn(2, 5))(X)

    def loading(self) -> None:
        adaptc.load(self.file)(X)

    def saving(self) -> None:
        adaptc.save(self.program, self.file)
        adaptc.save_adapter(self.program, self.adapter)

    def swapping_files(self) -> None:
        adaptc.swap(self.program, self.adapter)
        self.program(X)

    def swapping_ranks(self) -> None:
        self.count += 1
        adaptc.swap(self.program, adapter_tensors(1 + self.count % 40))
        self.program(X)
        self.program.validate()

    def binding(self) -> None:
        for form in ("apply", "weight", "auto"):
            self.program.bind(self.adapter, form=form)(X)

    def merging(self) -> None:
        adaptc.unmerge(adaptc.merge(self.program))(X)

    def unloading(self) -> None:
        adaptc.unload(self.program)(X)

    def copying(self) -> None:
        copy.deepcopy(self.program)(X)

    def training(self) -> None:
        self.program.module()(X)

    def setting_options(self) -> None:
        self.program.fuse = not self.program.fuse
        self.program(X)

    def reporting(self) -> None:
        str(adaptc.report(self.program))


DEEDS = [n for n in vars(Deeds) if not n.startswith("_")]
#: those that between them do most of what the others do
OFTEN = {"compiling", "swapping_ranks"}
#: sympy, which decides between forms and bounds its own memory, keeps a few objects of each of a thousand compiles
SYMPY = 25


def grown(do: Callable[[], None], first: int, then: int) -> Counter[str]:
    for _ in range(first):
        do()
    before = objects()
    for _ in range(then):
        do()
    return objects() - before


@pytest.mark.long
@pytest.mark.parametrize("deed", [d if d in OFTEN else pytest.param(d, marks=pytest.mark.slow) for d in DEEDS])
def test_nothing_is_left_behind(deed: str, tmp_path: Path) -> None:
    cycles = 6
    more = grown(getattr(Deeds(tmp_path), deed), 45 if deed == "swapping_ranks" else 4, cycles)
    for kind in ("ShapeEnv", "FakeTensorMode", "FakeTensor", "GraphModule", "Tensor", "Parameter", "Binding", "texts"):
        assert more[kind] == 0, f"{kind} are left"
    most = SYMPY if deed == "compiling" else 1
    assert more.total() <= most * cycles, more.most_common(8)


@pytest.mark.slow
def test_a_thousand_cycles_are_flat(tmp_path: Path) -> None:
    deeds = Deeds(tmp_path)

    def all_of_them() -> None:
        for deed in DEEDS:
            getattr(deeds, deed)()

    more = grown(all_of_them, 120, 1000 // len(DEEDS) + 1)
    assert more.total() < 3000, more.most_common(8)


def test_addresses_of_tensors_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_buffers, "MAX_ALIASES", 8)
    before = weight_buffers.forget_dead_tensors()
    kept = [torch.randn(3, 5) for _ in range(4)]
    for n in range(300):
        gone = [torch.randn(3, 5 + n) for _ in range(6)]
        weight_buffers.remember_tensors([*kept, *gone])
    assert weight_buffers.forget_dead_tensors() <= before + len(kept) + len(gone)
