"""Programs that write to buffers: what they write is theirs, and what is bound to a program has its own."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import adaptc
from adaptc import LoraConfig

CONFIG = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)


class Cache(nn.Module):
    """Appends each input to a cache; ``part`` is a part of it under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.register_buffer("cache", torch.zeros(11, 7))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))
        self.register_buffer("part", self.cache[:5])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.lin(x)
        self.cache.index_add_(0, self.at, y.sum(0, keepdim=True))
        self.at.add_(1)
        return y + self.cache.sum(0), self.part * 1


def program(backend: str = "eager", functional: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Cache()
    if functional:  # writes are outputs of the graph then
        model.part = torch.zeros(5, 7)
    exported = export(copy.deepcopy(model), (torch.randn(3, 5),), dynamic_shapes=({0: Dim("batch")},), strict=False)
    if functional:
        exported = exported.run_decompositions({})
    return model, adaptc.compile(exported, CONFIG, backend=backend)


def adapter(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "lin.lora_A.weight": torch.randn(2, 5, generator=g),
        "lin.lora_B.weight": torch.randn(7, 2, generator=g),
    }


def expected(model: nn.Module, prog: Any, tensors: dict[str, Tensor], xs: list[Tensor]) -> list[Any]:
    """What the model gives for these inputs, one after the other, with the adapter in its weight."""
    own = copy.deepcopy(model)
    scale = prog.binding.config.lora_alpha / 2
    own.lin.weight.data += scale * tensors["lin.lora_B.weight"] @ tensors["lin.lora_A.weight"]
    return [own(x) for x in xs]


INPUTS = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 2, 7)]


@pytest.mark.parametrize(("backend", "functional"), [("eager", False), ("eager", True), ("inductor", False)])
@pytest.mark.parametrize("form", ["apply", "weight"])
def test_bound_callables_do_not_meet(backend: str, functional: bool, form: str) -> None:
    model, prog = program(backend, functional)
    before = {k: t.clone() for k, t in prog.state_dict.items()}
    first, second = (prog.bind(adapter(seed), form=form) for seed in (1, 2))
    again = prog.bind(first.binding)  # the same adapter, and yet a callable of its own
    found: list[list[Any]] = [[], [], []]
    for x in INPUTS:
        for out, run in zip(found, (first, second, again), strict=True):
            out.append(run(x))
    for out, seed in zip(found, (1, 2, 1), strict=True):
        for new, old in zip(out, expected(model, prog, adapter(seed), INPUTS), strict=True):
            torch.testing.assert_close(new[0], old[0], rtol=1e-4, atol=1e-4)
            if not functional:  # what shares memory in the model does so in every callable
                torch.testing.assert_close(new[1], old[1], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(t, before[k]) for k, t in prog.state_dict.items())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_calls_of_one_program_see_each_other(backend: str) -> None:
    model, prog = program(backend)
    adaptc.swap(prog, adapter(1))
    for new, old in zip([prog(x) for x in INPUTS[:2]], expected(model, prog, adapter(1), INPUTS[:2]), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert prog.state_dict["at"].item() == 2
    # A swap changes the adapter, and not what was written; what is bound now starts from there.
    adaptc.swap(prog, adapter(2))
    bound = prog.bind(adapter(2))
    torch.testing.assert_close(bound(INPUTS[2]), prog(INPUTS[2]))
    assert prog.state_dict["at"].item() == 3
    base = prog.bind(None)
    base(INPUTS[0]), base(INPUTS[0])
    assert prog.state_dict["at"].item() == 3


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_threads_with_callables_of_their_own(backend: str) -> None:
    model, prog = program(backend)
    prog.bind(adapter(0))(INPUTS[0])
    results: dict[int, list[Any]] = {}

    def work(seed: int) -> None:
        run = prog.bind(adapter(seed))
        results[seed] = [run(x)[0] for x in INPUTS * 2]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed, found in results.items():
        for new, (old, _) in zip(found, expected(model, prog, adapter(seed), INPUTS * 2), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert prog.state_dict["at"].item() == 0


def test_without_state_callables_share_what_is_computed_once() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    prog = adaptc.compile(model, LoraConfig(r=2, target_modules=["0"]), example_inputs=torch.randn(3, 5))
    one, two = prog.bind(prog.binding), prog.bind(prog.binding)
    one(torch.randn(3, 5))
    assert two.held == one.held


class Counting(nn.Module):
    """Batch norm that learns its statistics in every call, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lin(x))


def test_statistics_of_a_graph_that_trains() -> None:
    model = Counting().train()
    exported = export(model, (torch.randn(4, 5),), dynamic_shapes=({0: Dim("batch")},), strict=False)
    prog = adaptc.compile(exported, CONFIG)
    before = prog.state_dict["norm.running_mean"].clone()
    bound = prog.bind(prog.binding)
    for _ in range(2):
        bound(torch.randn(6, 5) + 3)
    assert torch.equal(prog.state_dict["norm.running_mean"], before)
