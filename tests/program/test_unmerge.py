"""Unmerge: the program a merge came from, to the last bit, after any number of cycles; and keep_base=False."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig, MergeError
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.program.adapted_program import AdaptedProgram
from tests.support.cover import examples
from tests.support.pass_checks import Snapshot, export, inject

LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.head = nn.Linear(7, 13, bias=False)
        self.down = nn.Linear(11, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(ids)))))


IDS = torch.tensor([[1, 12, 3], [0, 5, 7]])


def compiled(dtype: torch.dtype = torch.float32, model: nn.Module | None = None, **config: Any) -> AdaptedProgram:
    torch.manual_seed(5)
    options = {**LORA, "target_modules": ["embed", "up", "down"], **config}
    return adaptc.compile(model or Net().to(dtype), LoraConfig(**options), example_inputs=IDS)


def bits(state: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}


def equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(torch.equal(b[k], v) and b[k].dtype == v.dtype for k, v in a.items())


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_thousand_cycles(dtype: torch.dtype) -> None:
    """Two adapters in turn: base, slots, merged weights and outputs are the first cycle's to the last bit.

    And nothing piles up.
    """
    program = compiled(dtype)
    bindings = [program.binding, compiled(dtype, lora_alpha=9).binding]
    base = bits(program.base_tensors)
    states, merged_states, outs = [], [], []
    for binding in bindings:
        adaptc.swap(program, binding)
        states.append(bits(program.state_dict))
        outs.append(program(IDS))
        merged_states.append(bits(adaptc.merge(program).state_dict))
    assert not torch.equal(outs[0], outs[1])
    assert not equal(merged_states[0], merged_states[1])
    gc.collect()
    alive = sum(type(o) is AdaptedProgram for o in gc.get_objects())
    for i in range(examples(1000)):
        which = i % 2
        adaptc.swap(program, bindings[which])
        merged = adaptc.merge(program)
        program = adaptc.unmerge(merged)
        if i % 50 < 2:
            assert equal(merged_states[which], merged.state_dict)
            assert equal(states[which], program.state_dict)
            assert equal(base, program.base_tensors)
            assert torch.equal(program(IDS), outs[which])
    program.validate()
    del merged
    gc.collect()
    assert sum(type(o) is AdaptedProgram for o in gc.get_objects()) <= alive + 1


def test_unmerge_gives_the_program_back() -> None:
    """Also when the program has moved on: what was merged is what comes back."""
    program = compiled()
    before, out, old = Snapshot.record(program), program(IDS), program.binding
    merged = adaptc.merge(program)
    adaptc.swap(program, compiled(r=5).binding)
    back = adaptc.unmerge(merged)
    back.validate()
    assert torch.equal(back(IDS), out)
    assert back.binding is old
    before.check(back)
    assert not torch.equal(program(IDS), out)
    # The merged program stays what it is, and can be unmerged again.
    assert torch.equal(adaptc.unmerge(merged)(IDS), out)


def test_what_cannot_be_unmerged() -> None:
    program = compiled()
    with pytest.raises(MergeError, match="never merged"):
        adaptc.unmerge(program)
    with pytest.raises(MergeError, match="ExportedProgram does not know what it was merged from"):
        adaptc.unmerge(export(Net(), IDS))  # type: ignore[arg-type]
    merged = adaptc.merge(compiled(), keep_base=False)
    with pytest.raises(MergeError, match="keep_base=False"):
        adaptc.unmerge(merged)
    torch.testing.assert_close(merged(IDS), program(IDS), rtol=1e-4, atol=1e-4)


class Tracked(nn.Module):
    """Linear layers over memory whose end can be seen."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7 + i, bias=False) for i in range(depth))
        self.memory: list[weakref.ref[Any]] = []
        for layer in self.layers:
            array = np.random.default_rng(1).normal(size=tuple(layer.weight.shape)).astype(np.float32)
            layer.weight = nn.Parameter(torch.from_numpy(array))
            self.memory.append(weakref.ref(array))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("safe", [True, False], ids=["safe", ""])
@pytest.mark.parametrize("scheme", [False, "pissa", "olora"])
def test_bases_are_given_up_one_at_a_time(monkeypatch: pytest.MonkeyPatch, safe: bool, scheme: Any) -> None:
    """When a new weight is made, the old ones of all sites before it are gone: at most one is held twice."""
    depth = 5
    model = Tracked(depth)
    memory = model.memory
    x = torch.randn(3, 7)
    options = {**LORA, "init_lora_weights": scheme, "target_modules": [f"layers.{i}" for i in range(depth)]}
    program = adaptc.compile(model, LoraConfig(**options), example_inputs=x)
    expected = program(x)
    del model
    changed = [weakref.ref(t) for t in program.binding.changed_base.values()]
    assert len(changed) == (depth if scheme else 0)
    real, alive = Lora.weight, list[int]()

    def weight(self: Lora, *args: Any) -> Tensor:
        alive.append(sum(m() is not None for m in memory))
        if changed:
            assert sum(m() is not None for m in changed) == alive[-1]
        return real(self, *args)

    monkeypatch.setattr(Lora, "weight", weight)
    gc.collect()
    merged = adaptc.merge(program, safe=safe, keep_base=False)
    # Once to see that nothing fails, then for good.
    assert alive == [depth] * depth + [depth - i for i in range(depth)]
    assert sum(m() is not None for m in memory) == 0
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(MergeError, match="keep_base=False"):
        adaptc.unmerge(merged)
    for use in (lambda: program(x), program.module, lambda: adaptc.merge(program), lambda: adaptc.unload(program)):
        with pytest.raises(AdaptcError, match="keep_base=False"):
            use()


def test_tied_bases_are_given_up_under_all_names() -> None:
    """And a base that others still read stays."""
    for fqns, expected in ((["embed.weight"], {"embed.weight"}), (["up.weight"], {"up.weight"})):
        program = export(Net(), IDS)
        adapted, done, values = inject(program, *fqns)
        released: list[str] = []
        Merge(done, values, release=released.append)(adapted)
        assert set(released) == expected

    class Functional(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids) @ torch.ones(7, 2)

    program = export(Functional(), IDS)
    adapted, done, values = inject(program, "embed.weight")
    released = []
    result = Merge(done, values, release=released.append)(adapted)
    assert set(released) == {"embed.weight", "head.weight"}
    assert result.program.state_dict["embed.weight"] is result.program.state_dict["head.weight"]


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merge_that_fails_changes_nothing(keep_base: bool) -> None:
    """Even at the last site, and when the base would have been given up on the way."""
    program = compiled(r=5)
    before, out = Snapshot.record(program), program(IDS)
    good = program.binding
    values = dict(good.values)
    values["down.lora_B.default.weight"] = nn.Parameter(torch.full((7, 5), 1e38))
    values["down.lora_A.default.weight"] = nn.Parameter(torch.full((5, 11), 1e38))
    adaptc.swap(program, Binding(values, good.methods, good.config))
    with pytest.raises(MergeError, match=r"'down.weight\|lora'.* not finite"):
        adaptc.merge(program, keep_base=keep_base)
    adaptc.swap(program, good)
    before.check(program)
    assert torch.equal(program(IDS), out)
    adaptc.merge(program, keep_base=keep_base)
