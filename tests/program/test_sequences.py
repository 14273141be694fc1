"""Random sequences of operations on one program, checked after each against a plain model that computes W + s B A.

The machine keeps a float64 model of what the program should be: the base weights, the current adapter, its scale. Every
rule does one public operation and the same on the model; the invariant compares outputs and validates the program.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support.cover import examples

SITES = {"emb": (7, 13), "up": (11, 7), "conv": (5, 11, 3), "down": (3, 5)}
CAPTURED: dict[str, Any] = {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.conv = nn.Conv1d(11, 5, 3, padding=2, dilation=2)
        self.down = nn.Linear(5, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.relu(self.up(self.emb(ids)))
        return self.down(torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2)))


def base_model() -> Net:
    if not CAPTURED:
        torch.manual_seed(11)
        # Frozen: convolution takes another kernel, with other rounding, for a weight that requires grad.
        CAPTURED["model"] = Net().requires_grad_(False)
    return CAPTURED["model"]


def random_adapter(rank: int, sites: list[str], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for s in sites:
        rows, cols, *k = SITES[s]
        a = torch.randn(rank, cols, *k, generator=g) / rank**0.5
        b = torch.randn(rows, rank, *([1] * len(k)), generator=g) / rank**0.5
        names = ("lora_embedding_A", "lora_embedding_B") if s == "emb" else ("lora_A.weight", "lora_B.weight")
        out |= {f"{s}.{names[0]}": a, f"{s}.{names[1]}": b}
    return out


def expected(tensors: dict[str, Tensor], scale: float, ids: Tensor) -> Tensor:
    twin = Net().double()
    twin.load_state_dict(base_model().state_dict())
    for s in {k.partition(".")[0] for k in tensors}:
        a, b = (t.detach().double() for k, t in sorted(tensors.items()) if k.startswith(f"{s}."))
        delta = (b.flatten(1) @ a.flatten(1)) * scale
        weight = getattr(twin, s).weight
        weight.data += delta.t() if s == "emb" else delta.reshape(weight.shape)
    return twin(ids)


ranks = st.sampled_from([1, 2, 3, 5, 16])
subsets = st.lists(st.sampled_from(sorted(SITES)), min_size=1, unique=True)
seeds = st.integers(0, 10_000)


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.dir = Path(self.folder.name)
        self.base = {k: v.clone() for k, v in base_model().state_dict().items()}

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(rank=ranks, alpha=st.sampled_from([3, 8]))
    def compile(self, rank: int, alpha: int) -> None:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(SITES), init_lora_weights=False)
        if "program" not in CAPTURED:
            CAPTURED["program"] = torch.export.export(
                base_model(),
                (torch.randint(0, 13, (3, 9)),),
                dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},),
            )
        self.program = adaptc.compile(CAPTURED["program"], config)
        self.tensors = {k: v.clone() for k, v in self.current().items()}
        self.scale, self.alpha = alpha / rank, float(alpha)
        self.bound: list[tuple[Any, dict[str, Tensor], float]] = []
        self.merged: list[tuple[adaptc.AdaptedProgram, dict[str, Tensor], float]] = []

    def current(self) -> dict[str, Tensor]:
        from adaptc.binding.bind import file_tensors

        return file_tensors(self.program.spec(), self.program.binding)

    def config(self, rank: int, alpha: int, sites: list[str], rslora: bool = False) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=sites, use_rslora=rslora)

    @rule(rank=ranks, alpha=st.sampled_from([1, 8, 20]), sites=subsets, seed=seeds, rslora=st.booleans())
    def swap(self, rank: int, alpha: int, sites: list[str], seed: int, rslora: bool) -> None:
        self.tensors = random_adapter(rank, sites, seed)
        adaptc.swap(self.program, self.tensors, config=self.config(rank, alpha, sites, rslora))
        self.scale, self.alpha = alpha / (rank**0.5 if rslora else rank), float(alpha)

    @rule(rank=ranks, sites=subsets, seed=seeds)
    def bind(self, rank: int, sites: list[str], seed: int) -> None:
        tensors = random_adapter(rank, sites, seed)
        bound = self.program.bind(tensors, config=self.config(rank, 6, sites))
        self.bound.append((bound, tensors, 6 / rank))

    @rule()
    def train_step(self) -> None:
        module = self.program.module()
        trainable = [p for p in module.parameters() if p.requires_grad]
        if trainable:
            optimizer = torch.optim.SGD(trainable, lr=0.05)
            module(torch.randint(0, 13, (2, 5))).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)  # many steps must not diverge
            optimizer.step()
            self.tensors = {k: v.clone() for k, v in self.current().items()}

    @rule()
    def merge(self) -> None:
        merged = adaptc.merge(self.program)
        assert not [n for n in merged.graph.nodes if "adaptc" in (n.meta.get("custom") or {})]
        ids = torch.randint(0, 13, (2, 7))
        torch.testing.assert_close(merged(ids).double(), expected(self.tensors, self.scale, ids), rtol=1e-4, atol=1e-4)
        self.merged.append((merged, dict(self.tensors), self.scale))

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def unmerge(self, data: st.DataObject) -> None:
        merged, tensors, scale = data.draw(st.sampled_from(self.merged))
        self.program, self.tensors, self.scale = adaptc.unmerge(merged), dict(tensors), scale
        config = self.program.binding.config
        assert isinstance(config, LoraConfig)
        self.alpha = float(config.lora_alpha)
        # Training moves slot tensors in place; what was merged then is what its tensors hold now.
        self.tensors = {k: v.clone() for k, v in self.current().items()}

    @rule()
    def unload(self) -> None:
        base = adaptc.unload(self.program)
        assert not [n for n in base.graph.nodes if "adaptc" in (n.meta.get("custom") or {})]
        for name, value in base_model().state_dict().items():
            assert torch.equal(base.state_dict[name], value)
        ids = torch.randint(0, 13, (2, 6))
        assert torch.equal(base(ids), base_model()(ids))

    @rule()
    def save_and_load(self) -> None:
        self.program = adaptc.load(adaptc.save(self.program, self.dir / "p.pt2"))
        self.bound, self.merged = [], []

    @rule()
    def adapter_through_a_file(self) -> None:
        adaptc.save_adapter(self.program, self.dir / "adapter")
        adaptc.swap(self.program, self.dir / "adapter")

    @rule(seed=seeds)
    def failing_swap(self, seed: int) -> None:
        bad = random_adapter(4, ["up", "down"], seed)
        bad["down.lora_B.weight"] = bad["down.lora_B.weight"][:, :3]
        try:
            adaptc.swap(self.program, bad, config=self.config(4, 8, ["up", "down"]))
        except adaptc.AdaptcError:
            return
        raise AssertionError("a wrong shape was accepted")

    @invariant()
    def computes_what_the_reference_does(self) -> None:
        if not hasattr(self, "program"):
            return
        ids = torch.randint(0, 13, (3, 8), generator=torch.Generator().manual_seed(5))
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(self.program(ids).double(), expected(self.tensors, self.scale, ids), **close)
        assert self.current().keys() == self.tensors.keys()
        for bound, tensors, scale in self.bound[-2:]:
            torch.testing.assert_close(bound(ids).double(), expected(tensors, scale, ids), **close)
        self.program.graph.lint()
        self.program.validate()
        torch.testing.assert_close(self.program.module()(ids), self.program(ids), **close)
        for name, value in self.base.items():
            assert torch.equal(base_model().state_dict()[name], value)


# A failing sequence is reported as found: shrinking one takes minutes, and every rule's arguments are short anyway.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
Sequences.TestCase.settings = settings(max_examples=examples(20), stateful_step_count=10, deadline=None, phases=PHASES)
TestSequences = pytest.mark.long(Sequences.TestCase)
