"""Adapters in half precision as a user meets them: the form for each number of rows, swaps, merges, memory, reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.passes.optimize import sibling_cost, sibling_groups
from tests.support.rounding import assert_close_to_rounding, assert_no_less_accurate
from tests.support.sibling_nets import LAYERS, Block, adapter, block, random_rows

BF16, FP16, FLOAT = torch.bfloat16, torch.float16, torch.float32
#: calls of few, of more and of many rows
FEW, MORE, MANY = 1, 100, 1000


@pytest.fixture(autouse=True)
def a_processor_that_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """And small layers, for which a product of any size is as cheap against the work."""
    monkeypatch.setattr(sibling_groups, "onednn_supports", lambda dtype: dtype in (FLOAT, BF16))
    monkeypatch.setattr(sibling_cost, "DISPATCH", sibling_cost.DISPATCH / 50)


def compiled(dtype: torch.dtype = BF16, layers: tuple[str, ...] = LAYERS, **options: Any) -> adaptc.AdaptedProgram:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(layers), init_lora_weights=False, inference_mode=True)
    torch.manual_seed(2)
    options = {"autocast_adapter_dtype": False, "example_inputs": random_rows(2, dtype), **options}
    return adaptc.compile(block(dtype), config, **options)


def adapted(rank: int, seed: int, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    return {k: v.to(dtype) for k, v in adapter(rank, seed).items()}


def exact(plain: adaptc.AdaptedProgram) -> Block:
    """What a program means, in float64."""
    state = {k: v.detach().double() for k, v in plain.state_dict.items()}
    net = block()
    for name, layer in net.named_children():
        weight = state[f"{name}.weight"]
        if f"{name}.scaling.default.lora" in state:
            a, b = (state[f"{name}.lora_{s}.default.weight"] for s in "AB")
            weight = weight + b @ a * state[f"{name}.scaling.default.lora"]
        layer.weight.data = weight
        if f"{name}.bias" in state:
            layer.bias.data = state[f"{name}.bias"]
    return net


def right(program: Any, plain: adaptc.AdaptedProgram, n: int, dtype: torch.dtype = BF16) -> None:
    """Hardly further from float64 than the graph itself, in calls of n rows: a scale that is folded rounds B once more.
    So many calls that what rounds to which side evens out."""
    calls = random_rows(max(n, MORE), dtype).split(n)
    with torch.no_grad():
        found, theirs = (torch.cat([f(x) for x in calls]) for f in (program, plain.module()))
        assert_no_less_accurate(found, theirs, exact(plain)(torch.cat(calls).double()), factor=1.25)


def kinds(program: adaptc.AdaptedProgram) -> set[str]:
    return set(program.executor().variants.trails)


def test_the_form_follows_the_rows() -> None:
    program = compiled()
    seen: set[str] = set()
    for n, kind in ((FEW, "wide"), (MORE, "stacked"), (MANY, "apart")):
        right(program, program, n)
        assert kinds(program) - seen == {kind}
        seen.add(kind)
    trails = {k: dict(t) for k, t in program.executor().variants.trails.items()}
    assert all(t["fold_scales"] == 4 for t in trails.values())
    with adaptc.debug.assert_no_recompiles():
        for n in (FEW, MORE, 2, 0, FEW):
            program(random_rows(n, BF16))
    assert kinds(program) == seen


@pytest.mark.parametrize("slots", ["float32", "own"])
def test_who_has_no_other_form(slots: str) -> None:
    """float32 adapters have nothing to widen; float16 is not multiplied, and so is float32 in every form."""
    program = compiled(FP16, autocast_adapter_dtype=slots == "float32")
    for n in (FEW, MORE):
        right(program, program, n, FP16)
    assert kinds(program) <= {"stacked", "apart"}
    assert bool(program.fusion.wide) == bool(program.held.wide_nbytes) == (slots == "own")
    if slots == "own":
        assert "computed in float32 in 1 products (the processor does not multiply their type)" in str(program.fusion)


@pytest.mark.long
def test_swaps_and_bindings() -> None:
    program = compiled()
    for n in (FEW, MORE):
        program(random_rows(n, BF16))
    bound = program.bind(adapted(7, 4))
    expected = {n: program.with_binding(bound.binding)(random_rows(n, BF16)) for n in (FEW, MORE)}
    for rank in (1, 7):
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(program, adapted(rank, rank))
            for n in (FEW, MORE):
                program(random_rows(n, BF16))
                assert torch.equal(bound(random_rows(n, BF16)), expected[n])
        for n in (FEW, MORE):
            right(program, program, n)
    assert kinds(program) == {"wide", "stacked"}


@pytest.mark.long
def test_a_write_is_seen_in_every_form() -> None:
    program = compiled()
    before = {n: program(random_rows(n, BF16)) for n in (FEW, MORE)}
    with torch.no_grad():
        program.state_dict["q.lora_B.default.weight"].mul_(3)
    for n, out in before.items():
        assert not torch.equal(program(random_rows(n, BF16)), out)
        right(program, program, n)


def test_merged_verified_saved(tmp_path: Any) -> None:
    program, x = compiled(), random_rows(FEW, BF16)
    assert adaptc.verify(program, block(BF16)).ok
    with torch.no_grad():
        # One rounding of each weight, where the graph rounds what is added to each output.
        many = random_rows(MORE, BF16)
        assert_no_less_accurate(
            adaptc.merge(program)(many), program.module()(many), exact(program)(many.double()), factor=1.25
        )
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    assert torch.equal(loaded(x), program(x))
    assert_close_to_rounding(adaptc.unload(program)(x), block(BF16)(x))


def test_copies_are_told_and_count_against_the_limit() -> None:
    program = compiled()
    program(random_rows(MORE, BF16))
    assert program.held.wide_nbytes == 0
    few = program.held.nbytes
    program(random_rows(FEW, BF16))
    held = program.held
    # A and B of three siblings, with the blocks of zeros between them; the scaled B of the layer that is not fused is
    # there once more.
    stacked = 4 * (9 * 7 + 20 * 9)
    assert held.wide_nbytes == stacked == 972
    assert held.nbytes - few == stacked + 2 * 5 * 3
    said = str(adaptc.report(program))
    assert "972 B of it in float32, of half precision" in said
    assert "adapters in half precision: computed in float32 in 1 products (for up to 64 rows, where" in said
    for limit in (held.nbytes, few + 2, few, 50, 0):
        program.hoist_limit = limit
        for n in (MORE, FEW):
            right(program, program, n)
        assert program.held.nbytes + program.held.shared_nbytes <= limit
    program.hoist_limit = None
    program(random_rows(FEW, BF16))
    assert program.held.wide_nbytes == stacked


def test_without_room_for_copies_the_narrow_form_runs() -> None:
    program = compiled()
    program(random_rows(MORE, BF16))
    room = program.held.nbytes + program.held.shared_nbytes
    program = compiled(hoist_limit=room)
    right(program, program, FEW)
    variants = program.executor().variants
    assert variants.get("wide") is variants.get("stacked")
    assert variants.get("stacked") is not variants.get("plain")
    assert 0 < program.held.nbytes < room
    assert program.held.wide_nbytes == 0


def test_gradients_of_inputs() -> None:
    program = compiled()
    for n in (FEW, MORE):
        x = random_rows(n, BF16).requires_grad_()
        high = random_rows(n, BF16).double().requires_grad_()
        (found,) = torch.autograd.grad(program(x).float().sum(), x)
        (theirs,) = torch.autograd.grad(program.module()(x).float().sum(), x)
        (best,) = torch.autograd.grad(exact(program)(high).sum(), high)
        assert_no_less_accurate(found, theirs, best)
