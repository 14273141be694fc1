"""Fused programs as a user meets them: equal outputs, weights held once, swaps, bindings in both forms, the base."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, MergeError
from adaptc.runtime.weight_buffers import is_packable, move_into_buffer, remember_tensors
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.sibling_nets import LAYERS, adapter, assert_close, block, compile_block, random_rows


@pytest.mark.long
def test_a_fused_program_computes_what_its_graph_says() -> None:
    program = compile_block()
    for n in (1, 2, 400):  # few rows are stacked, many are not
        assert_close(program(random_rows(n)), program.module()(random_rows(n)))
    assert (program.fusion.groups, program.fusion.layers, program.fusion.adapted) == (1, 3, 3)
    assert program.fusion.rows > 2 * 3
    assert set(program.executor().variants.trails) >= {"stacked"}
    assert "3 layers in 1 products, 3 with an adapter" in str(adaptc.report(program))


def test_compiled_code_is_plain() -> None:
    program = compile_block(backend="inductor")
    assert_close(program(random_rows(3)), program.module()(random_rows(3)))
    assert program.fusion.groups == 0
    assert set(program.executor().variants.trails) == {"plain"}


def test_both_ways_of_fusing_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.passes.optimize import sibling_cost

    monkeypatch.setattr(sibling_cost, "DISPATCH", 600)
    program = compile_block()
    assert_close(program(random_rows(1)), program.module()(random_rows(1)))
    assert set(program.executor().variants.trails) == {"stacked"}
    assert_close(program(random_rows(90)), program.module()(random_rows(90)))
    assert set(program.executor().variants.trails) == {"stacked", "apart"}


def test_every_weight_is_held_once() -> None:
    model = block()
    before = copy.deepcopy(model.state_dict())
    program = compile_block(model)
    program(random_rows(2))
    arguments = program.call_state.arguments
    assert arguments is not None
    prefix = arguments.inputs_for("stacked")
    packed = [t for t in prefix.originals if t.ndim == 2 and t.shape == (20, 7)]
    assert len(packed) == 1
    start, end = packed[0].data_ptr(), packed[0].data_ptr() + packed[0].nbytes
    for holder in (model.state_dict(), program.state_dict, program.base_tensors):
        for name in ("q.weight", "k.weight", "v.weight"):
            assert start <= holder[name].data_ptr() < end, name
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # Each has a storage of its own, so that files of them are no larger than they were.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    with torch.no_grad():
        model.k.weight.mul_(2)
    assert_close(program(random_rows(2)), program.module()(random_rows(2)))


@pytest.mark.long
def test_the_buffer_is_given_up_with_the_base() -> None:
    program = compile_block()
    expected = program(random_rows(2))
    assert program.call_state.arguments is not None
    prefix = program.call_state.arguments.inputs_for("stacked")
    buffer = StorageWeakRef(next(t for t in prefix.originals if t.shape == (20, 7)).untyped_storage())
    del prefix
    gc.collect()  # what is left of capturing the model
    merged = adaptc.merge(program, keep_base=False)
    assert buffer.expired()
    assert_close(merged(random_rows(2)), expected)


@pytest.mark.long
def test_two_programs_of_one_model_share_the_buffer() -> None:
    model = block()
    first, second = compile_block(model), compile_block(model, targets=("q", "v"))
    first(random_rows(2)), second(random_rows(2))
    third = compile_block(model)
    third(random_rows(2))
    pointers = [{p.base_tensors[f"{n}.weight"].data_ptr() for n in "qkv"} for p in (first, second, third)]
    assert pointers[0] == pointers[1] == pointers[2] == {model.get_parameter(f"{n}.weight").data_ptr() for n in "qkv"}
    assert third.executor().variants.get("stacked").sibling_packs
    for p in (first, second, third):
        assert_close(p(random_rows(4)), p.module()(random_rows(4)))


# Without shrinking, which compiles anew for every smaller example.
@pytest.mark.long
@settings(max_examples=examples(8), phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layers=st.sets(st.sampled_from(LAYERS), min_size=1).map(lambda s: tuple(sorted(s))),
    backend=st.sampled_from(["eager", "eager", "inductor"]),
)
def test_swaps_to_any_rank_and_subset(ranks: list[int], layers: tuple[str, ...], backend: str) -> None:
    program = compile_block(backend=backend, dtype=torch.float32)
    program(random_rows(2, torch.float32))
    for i, rank in enumerate(ranks):
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(program, adapter(rank, i, layers if i % 2 else LAYERS))
            found = program(random_rows(3, torch.float32))
        expected = adaptc.merge(program)(random_rows(3, torch.float32))
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_a_base_of_its_own_is_packed_for_its_binding_alone() -> None:
    model = block(torch.float32)
    config = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights="pissa", inference_mode=True)
    program = adaptc.compile(model, config, example_inputs=random_rows(2, torch.float32))
    x = random_rows(3, torch.float32)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)
    plain = program.bind({k: v.float() for k, v in adapter(3, 1, ("q", "v")).items()})
    torch.testing.assert_close(plain(x), adaptc.merge(program.with_binding(plain.binding))(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(adaptc.unload(program)(x), model(x))


def test_not_fused_where_not_wanted() -> None:
    model = block()
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    program = compile_block(model, fuse=False)
    assert torch.equal(program(random_rows(2)), program.module()(random_rows(2)))
    assert (program.fusion.groups, {n: p.data_ptr() for n, p in model.named_parameters()}) == (0, before)
    program.fuse = True
    assert_close(program(random_rows(2)), program.module()(random_rows(2)))
    assert program.fusion.groups == 1


def test_no_room_for_what_fusing_stacks() -> None:
    program = compile_block(hoist_limit=16)
    assert_close(program(random_rows(2)), program.module()(random_rows(2)))
    assert program.executor().variants.get("stacked") is program.executor().variants.get("plain")
    assert program.held.nbytes <= 16


def test_adapters_in_training_are_read_in_every_call() -> None:
    config = LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False)
    program = adaptc.compile(block(), config, example_inputs=random_rows(2))
    before = program(random_rows(2))
    with torch.no_grad():
        program.state_dict["q.lora_B.default.weight"].mul_(3)
    assert not torch.allclose(program(random_rows(2)), before)
    assert_close(program(random_rows(2)), program.module()(random_rows(2)))


def test_under_autocast_nothing_is_fused() -> None:
    program = compile_block(dtype=torch.float32)
    x = random_rows(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(program(x), program.module()(x))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_families(name: str) -> None:
    family = FAMILIES[name]
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    program = adaptc.compile(family.build(), config)
    for batch, seq in ((1, 5), (3, 9)):
        x = family.inputs(batch, seq)
        found, expected = program(**x), program.module()(**x)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert program.fusion.layers > program.fusion.groups > 0


class TestBound:
    def test_the_weight_form_is_the_base_on_weights_of_its_own(self) -> None:
        program = compile_block()
        a, w = (program.bind(adapter(4, 3), form=f) for f in ("apply", "weight"))
        assert_close(w(random_rows(5)), a(random_rows(5)))
        assert (a.form, w.form) == ("apply", "weight")
        assert w.held.nbytes == sum(p.nbytes for n, p in block().named_parameters() if n.endswith("weight"))
        assert "weight form, 1.9 KiB of weights" in repr(w)
        expected = w(random_rows(5))
        adaptc.swap(program, adapter(2, 9))
        assert_close(w(random_rows(5)), expected)
        assert not torch.allclose(program(random_rows(5)), expected)
        assert all(torch.equal(v, block().state_dict()[k]) for k, v in program.base_tensors.items())

    def test_a_part_of_the_siblings_does_not_take_the_others_along(self) -> None:
        program = compile_block(targets=("q", "k", "v"))
        program(random_rows(2))
        where = {n: t.data_ptr() for n, t in program.base_tensors.items()}
        w = program.bind(adapter(2, 3, ("q", "v")), form="weight")
        assert_close(w(random_rows(5)), program.bind(adapter(2, 3, ("q", "v")))(random_rows(5)))
        assert {n: t.data_ptr() for n, t in program.base_tensors.items()} == where
        assert w.held.nbytes == (6 + 10) * 7 * 8

    @pytest.mark.long
    def test_auto_says_why(self) -> None:
        program = compile_block()
        assert program.bind(adapter(2, 1), form="auto").why.endswith("work in every call")
        small = program.bind(adapter(2, 1), form="auto", memory_limit=100)
        assert (small.form, "over the limit of 100" in small.why) == ("apply", True)
        half = compile_block(dtype=torch.bfloat16)
        bound = half.bind({k: v.float() for k, v in adapter(2, 1).items()}, form="auto")
        assert (bound.form, "half precision" in bound.why) == ("apply", True)

    def test_refused(self) -> None:
        program = compile_block()
        with pytest.raises(ConfigError, match="form='fast' is not one of apply, weight, auto"):
            program.bind(adapter(2, 1), form="fast")
        with pytest.raises(ConfigError, match="memory_limit=-1"):
            program.bind(adapter(2, 1), form="auto", memory_limit=-1)


class TestBase:
    def test_computes_the_unadapted_model_on_the_same_weights(self) -> None:
        model = block()
        program = compile_block(model)
        program(random_rows(2))
        base = program.base
        assert_close(base(random_rows(3)), model(random_rows(3)))
        assert base is program.base
        assert not base.adaptation.attachments
        state, own = program.state_dict, base.state_dict
        assert all(own[k].data_ptr() == state[k].data_ptr() for k in own)
        assert set(own) == set(model.state_dict())
        # The weights are packed already: the base reads the same buffer.
        lists = [
            p.call_state.arguments.inputs_for("stacked").originals
            for p in (program, base)
            if p.call_state.arguments is not None
        ]
        buffers = [{t.data_ptr() for t in tensors if t.shape == (20, 7)} for tensors in lists]
        assert buffers[0] == buffers[1]
        assert len(buffers[0]) == 1

    def test_is_fused_as_its_program_is(self) -> None:
        program = compile_block()
        assert program.base.fuse is True
        program.fuse = False
        assert program.base.fuse is False

    def test_what_has_no_base_says_so(self, tmp_path: Any) -> None:
        config = LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")
        program = adaptc.compile(block(torch.float32), config, example_inputs=random_rows(2, torch.float32))
        loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
        with pytest.raises(MergeError, match="base cannot be given back"):
            _ = loaded.base


class TestPacking:
    def test_all_who_share_the_memory_move(self) -> None:
        a, b = (nn.Parameter(torch.randn(n, 3)) for n in (2, 5))
        twin = nn.Parameter(a.detach(), requires_grad=False)
        remember_tensors([a, b, twin])
        expected = torch.cat([a, b]).detach()
        buffer = move_into_buffer([a, b])
        assert torch.equal(buffer, expected)
        assert move_into_buffer([twin, b]) is buffer
        with torch.no_grad():
            a.add_(1)
        assert torch.equal(buffer[:2], a)
        assert torch.equal(twin, a)
        assert a.requires_grad
        assert not twin.requires_grad
        assert move_into_buffer([b, a]) is not buffer

    def test_what_stays_where_it_is(self) -> None:
        shared = torch.randn(2, 3)
        shared.share_memory_()
        for t in (shared, torch.randn(3), torch.randn(3, 2).t(), torch.zeros(2, 2, dtype=torch.int64)):
            assert not is_packable(t)
        assert not is_packable(torch.empty(2, 3, device="meta"))
        assert is_packable(torch.randn(2, 3))
