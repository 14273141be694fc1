"""Random sequences of operations on one program that holds adapters of many methods, each checked against its own.

The program is compiled once for all of them. What an adapter must compute is known from a program compiled for it
alone, whose equality with PEFT is tested elsewhere; here it is that no sequence of operations mixes them up.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import adaptc
from tests.support.cover import examples
from tests.support.subject import adapter_parameters

UP, DOWN, BOTH = ["up"], ["down"], ["up", "down"]

#: name -> config class and fields; several of one method that need code of their own, and several that share it
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 3, "target_modules": BOTH}),
    "lora_small": ("LoraConfig", {"r": 1, "target_modules": DOWN, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": UP}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10, "target_modules": UP}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": BOTH}),
    "oft": ("OFTConfig", {"oft_block_size": 3, "target_modules": BOTH}),
    "oft_wide": ("OFTConfig", {"oft_block_size": 5, "target_modules": UP}),
    "ia3_out": ("IA3Config", {"feedforward_modules": [], "target_modules": BOTH}),
    "ia3_in": ("IA3Config", {"feedforward_modules": DOWN, "target_modules": DOWN}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": UP}),
    "vera": ("VeraConfig", {"r": 5, "target_modules": BOTH}),
    "vera_one": ("VeraConfig", {"r": 3, "target_modules": DOWN, "projection_prng_key": 5}),
    "fourier": ("FourierFTConfig", {"n_frequency": 19, "target_modules": BOTH}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 4], "target_modules": ["emb"]}),
    "norm": ("LNTuningConfig", {"target_modules": ["norm"]}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 15)
        self.up = nn.Linear(15, 21)
        self.norm = nn.LayerNorm(21)
        self.down = nn.Linear(21, 9, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(self.emb(ids)))))


IDS = torch.tensor([[1, 2, 4, 11, 3], [4, 4, 12, 1, 0]])


@cache
def model() -> nn.Module:
    torch.manual_seed(11)
    net = Net().double().requires_grad_(False)
    with torch.no_grad():
        net.norm.bias.normal_()
    return net.eval()


@cache
def home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def config(name: str) -> Any:
    cls, fields = ADAPTERS[name]
    return getattr(adaptc, cls)(**fields)


def adapter(name: str, seed: int = 0) -> tuple[Path, Tensor]:
    return made(name, seed)


@cache
def made(name: str, seed: int) -> tuple[Path, Tensor]:
    """An adapter on disk, and what the model computes with it."""
    path = Path(home().name) / f"{name}-{seed}"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = adaptc.compile(captured(), config(name))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in adapter_parameters(program).values():
            if t.is_floating_point():
                t.add_(torch.randn(t.shape, generator=g, dtype=t.dtype) * 0.4)
    adaptc.save_adapter(program, path)
    return path, program(IDS).detach().clone()


@cache
def captured() -> adaptc.AdaptedProgram:
    return adaptc.unload(adaptc.compile(model(), config("lora"), example_inputs=IDS))


@cache
def compiled() -> adaptc.AdaptedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adaptc.compile(captured(), [config(n) for n in ADAPTERS])


names = st.sampled_from(sorted(ADAPTERS))
seeds = st.integers(0, 2)


class Sequences(RuleBasedStateMachine):
    @initialize(name=names)
    def start(self, name: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        path, self.expected = adapter(name)
        self.program = compiled().with_binding(compiled().bind(path).binding)
        self.bound: list[tuple[Any, Tensor]] = []

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule(name=names, seed=seeds)
    def swap(self, name: str, seed: int) -> None:
        path, expected = adapter(name, seed)
        adaptc.swap(self.program, path)
        self.expected = expected

    @rule(name=names, seed=seeds)
    def bind(self, name: str, seed: int) -> None:
        path, expected = adapter(name, seed)
        self.bound.append((self.program.bind(path), expected))

    @rule()
    def merge_and_unmerge(self) -> None:
        merged = adaptc.merge(self.program)
        torch.testing.assert_close(merged(IDS), self.expected, rtol=1e-8, atol=1e-8)
        before = self.program(IDS)
        self.program = adaptc.unmerge(merged)
        assert torch.equal(self.program(IDS), before)

    @rule()
    def save_and_load(self) -> None:
        self.count += 1
        self.program = adaptc.load(adaptc.save(self.program, Path(self.folder.name) / f"{self.count}.pt2"))

    @rule()
    def write_and_read_the_adapter(self) -> None:
        self.count += 1
        adaptc.swap(self.program, adaptc.save_adapter(self.program, Path(self.folder.name) / f"a{self.count}"))

    @rule()
    def a_bad_adapter_changes_nothing(self) -> None:
        with pytest.raises(adaptc.AdaptcError):
            adaptc.swap(self.program, {"up.lora_A.weight": torch.full((3, 15), float("nan"), dtype=torch.float64)})

    @precondition(lambda self: self.bound)
    @rule()
    def bound_ones_keep_their_own(self) -> None:
        for bound, expected in self.bound:
            torch.testing.assert_close(bound(IDS), expected, rtol=1e-8, atol=1e-8)

    @invariant()
    def computes_its_adapter(self) -> None:
        if hasattr(self, "program"):
            torch.testing.assert_close(self.program(IDS), self.expected, rtol=1e-8, atol=1e-8)
            self.program.validate()


TestSequences = pytest.mark.long(Sequences.TestCase)
TestSequences.settings = settings(max_examples=examples(15), stateful_step_count=8, deadline=None)


@pytest.mark.long
def test_every_adapter_says_something():
    plain = model()(IDS)
    for name in ADAPTERS:
        assert not torch.allclose(adapter(name)[1], plain, rtol=1e-3, atol=1e-3), name


@pytest.mark.long
def test_any_two_methods_share_a_program():
    """Names of slots do not clash, and what the one does not have leaves alone what the other makes."""
    for one, two in itertools.combinations(["lora", "dora", "adalora", "hra", "ia3_out", "loha", "vera", "fourier"], 2):
        program = adaptc.compile(captured(), [config(one), config(two)])
        for name in (one, two):
            path, expected = adapter(name)
            adaptc.swap(program, path)
            torch.testing.assert_close(
                program(IDS), expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=(one, two, name): f"{n}: {m}"
            )
            torch.testing.assert_close(program.module()(IDS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_unload_gives_the_base_whatever_was_compiled():
    program = compiled().with_binding(compiled().bind(adapter("hra")[0]).binding)
    assert torch.equal(adaptc.unload(program)(IDS), torch.export.export(model(), (IDS,)).module()(IDS))
