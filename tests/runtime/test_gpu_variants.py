"""Programs that run as fused kernels, as a user meets them: equal to the plain ones, swapped, trained, saved.

Without a GPU the kernels' ops compute their references; tests/kernels runs the same ops interpreted.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adaptc
from adaptc import LoraConfig
from adaptc.api.merge_and_lower import insert_kernels
from adaptc.errors import BackendError
from adaptc.kernels import packed_lora_direct
from adaptc.runtime.variants.gpu_variants import runs_on_gpu
from tests.kernels import run_cases
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.sibling_nets import LAYERS, adapter, assert_close, block, random_rows

Pair = tuple[adaptc.AdaptedProgram, adaptc.AdaptedProgram]


def compiled(model: nn.Module, kernels: bool, dora: bool = False, **options: Any) -> adaptc.AdaptedProgram:
    """With adapters around the layers; without kernels each layer is computed on its own."""
    frozen = not options.get("training", False)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=list(LAYERS), init_lora_weights=False, use_dora=dora, inference_mode=frozen
    )
    torch.manual_seed(2)
    program = adaptc.compile(model, config, example_inputs=random_rows(4), form="apply", fuse=kernels, **options)
    program.kernels = kernels or None
    return program


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The plain program, and one with kernels."""
    model = block()
    return compiled(model, False), compiled(model, True)


def state(rank: int, dora: bool, seed: int = 3) -> dict[str, Tensor]:
    out = adapter(rank, seed)
    g = torch.Generator().manual_seed(seed)
    for n in LAYERS if dora else ():
        lengths = torch.rand(getattr(block(), n).out_features, generator=g, dtype=torch.float64)
        out[f"{n}.lora_magnitude_vector"] = 1 + lengths
    return out


def ops(program: adaptc.AdaptedProgram, kind: str) -> list[str]:
    """The kernels in one kind of code."""
    names = [str(n.target) for n in program.executor().variants.get(kind).split.main.graph.nodes]
    return [n.split(".")[1] for n in names if n.startswith("adaptc.")]


@pytest.mark.long
@settings(max_examples=examples(30), deadline=None)
@given(st.integers(2, 9), st.integers(1, 7), st.integers(0, 99), st.sets(st.sampled_from(LAYERS), min_size=1))
def test_every_adapter_and_size(pair: Pair, n: int, rank: int, seed: int, layers: set[str]) -> None:
    plain, fused = pair
    tensors = adapter(rank, seed, tuple(sorted(layers)))
    for program in pair:
        adaptc.swap(program, tensors)
    assert_close(fused(random_rows(n)), plain(random_rows(n)))


def test_all_calls_take_one_variant_whose_adapters_are_packed(pair: Pair) -> None:
    plain, fused = pair
    fused = fused.with_binding(fused.binding)
    fused.kernels = None
    fused.kernels = True
    for n in (5, 6):  # 15 and 18 rows
        assert_close(fused(random_rows(n)), plain(random_rows(n)))
    assert list(fused.executor().variants.trails) == ["packed"]
    assert ops(fused, "packed") == ["packed_lora"] * 2  # q, k and v in one
    assert ops(fused, "plain") == ["lora_linear"] * 4
    assert not ops(plain, "plain")
    assert not [n for n in fused.graph.nodes if str(n.target).startswith("adaptc.")]


def test_a_call_goes_to_packed_layers_without_the_dispatch_of_their_op(pair: Pair) -> None:
    _, fused = pair
    fused(random_rows(2))
    code = fused.executor().variants.get("packed").code.graph
    assert [n.target for n in code.nodes if n.op == "call_function"].count(packed_lora_direct) == 2
    x = random_rows(2).requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    expected = torch.autograd.functional.jacobian(lambda t: pair[0](t).sum(), random_rows(2))
    assert_close(x.grad, expected)


def test_a_swap_under_a_captured_graph_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph replays the adapter that it captured, so a swap would change nothing that it computes."""
    program = pair[1].with_binding(pair[1].binding)
    bound = program.bind(adapter(2, 7))
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        bound(random_rows(2))
    adaptc.swap(program, adapter(4, 5))  # what is bound keeps its adapter, with a graph or without
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = program(random_rows(2))
    with pytest.raises(BackendError, match=r"CUDA graph has captured.*prog\.bind\(adapter\).*copy\.copy\(prog\)"):
        adaptc.swap(program, adapter(3, 6))
    assert torch.equal(program(random_rows(2)), captured)  # a failed swap changes nothing
    other = copy.copy(program)
    adaptc.swap(other, adapter(3, 6))
    adaptc.swap(program, program.binding)
    assert not torch.equal(other(random_rows(2)), captured)


def test_the_report_says_what_runs_as_kernels() -> None:
    program = compiled(block(), True)
    program(random_rows(2))
    text = str(adaptc.report(program))
    assert "fused: 3 layers in 1 products, 3 with an adapter" in text
    assert "fused kernels: 4 regions" in text
    x = torch.randn(2, 3, 7)
    other = adaptc.compile(
        nn.Sequential(nn.Conv1d(3, 5, 2)), LoraConfig(target_modules=["0"]), example_inputs=x, form="apply"
    )
    other.kernels = True
    other(x)
    assert "no fused kernel for 1: there are no kernels for a consumer of kind 'conv1d'" in str(adaptc.report(other))


def test_without_fuse_each_layer_keeps_a_kernel_of_its_own() -> None:
    program = compiled(block(), True)
    expected = program(random_rows(7))
    program.fuse = False
    assert_close(program(random_rows(7)), expected)
    assert (program.fusion.kernels, program.fusion.groups) == (4, 0)
    assert ops(program, "packed") == ["packed_lora"] * 4


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_inductor_compiles_kernels_once_for_all_ranks(dora: bool) -> None:
    model = block()
    plain, fused = compiled(model, False, dora), compiled(model, True, dora, backend="inductor")
    fused(random_rows(8))
    assert fused.fusion.kernels == 4
    for rank in (1, 6):
        adaptc.swap(plain, state(rank, dora))
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(fused, state(rank, dora))
            found = fused(random_rows(8)), fused(random_rows(3))
        for a, b in zip(found, (plain(random_rows(8)), plain(random_rows(3))), strict=True):
            assert_close(a, b)


@pytest.mark.long
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_of_a_program_that_trains(dora: bool) -> None:
    model = block()
    found = []
    for kernels in (False, True):
        program = compiled(model, kernels, dora, training=True)
        x = random_rows(7).requires_grad_()
        out = program(x)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
        slots = [t for t in program.binding.values.values() if t.requires_grad]
        assert all(t.grad is not None for t in slots)
        found.append([out, x.grad, *(t.grad for t in slots)])
        assert bool(ops(program, "plain")) == kernels
    assert len(found[0]) == 2 + len(LAYERS) * (3 if dora else 2)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.long
def test_calls_of_a_program_that_trains_with_dropout_take_kernels() -> None:
    found = []
    for kernels in (False, True):
        config = LoraConfig(r=3, target_modules=list(LAYERS), init_lora_weights=False, lora_dropout=0.4)
        torch.manual_seed(2)
        program = adaptc.compile(
            block(), config, example_inputs=random_rows(4), form="apply", training=True, fuse=kernels
        )
        program.kernels = kernels or None
        found.append(program(random_rows(7)))
    assert_close(found[1], found[0])
    assert ops(program, "plain") == ["lora_linear"] * 4


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_families(family: str) -> None:
    f = FAMILIES[family]
    model = f.build()
    config = LoraConfig(r=5, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    program = adaptc.compile(model, config, fuse=False, form="apply")
    for n in (1, 3):
        inputs = f.inputs(n, 7)
        program.fuse, program.kernels = False, None
        expected = program(**inputs)[0]
        program.fuse, program.kernels = True, True
        torch.testing.assert_close(program(**inputs)[0], expected, rtol=2e-5, atol=2e-6)
    assert program.fusion.kernels == len(program.adaptation.attachments)
    assert not program.fusion.others


def test_kernels_are_the_default_on_a_gpu_alone() -> None:
    with FakeTensorMode():
        assert runs_on_gpu([None, torch.empty(2, device="cuda")])
    assert not runs_on_gpu([torch.empty(2)])


def test_without_triton_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(block(), False)
    monkeypatch.setattr("adaptc.runtime.variants.gpu_variants.find_spec", lambda name: None)
    program.kernels = True
    with pytest.raises(BackendError, match="need triton, which is not installed"):
        program(random_rows(2))
    with pytest.raises(BackendError, match="need triton"):
        adaptc.debug.lower(program)
    with FakeTensorMode():
        assert not runs_on_gpu([torch.empty(2, device="cuda")])
    assert importlib.util.find_spec("triton") is not None


def test_lower_wants_a_gpu() -> None:
    program = compiled(block(), False)
    with pytest.raises(BackendError, match=r"weights are not on a GPU.*model\.cuda\(\)"):
        adaptc.debug.lower(program)


@pytest.mark.long
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_lowered_program_swaps_merges_and_unloads(dora: bool) -> None:
    program = compiled(block(), False, dora)
    low = insert_kernels(program)
    assert [n for n in low.graph.nodes if str(n.target).startswith("adaptc.")]
    assert low.adaptation.attachments == program.adaptation.attachments
    for rank in (1, 6):
        for p in (program, low):
            adaptc.swap(p, state(rank, dora))
        low.validate()
        expected = program(random_rows(5))
        assert_close(low(random_rows(5)), expected)
        assert_close(low.module()(random_rows(5)), expected)
        merged = adaptc.merge(low)
        assert torch.equal(merged(random_rows(5)), adaptc.merge(program)(random_rows(5)))
        assert not [n for n in merged.graph.nodes if str(n.target).startswith("adaptc.")]
        assert_close(adaptc.unmerge(merged)(random_rows(5)), expected)
    assert torch.equal(adaptc.unload(low)(random_rows(5)), adaptc.unload(program)(random_rows(5)))


def test_its_file_is_refused_without_a_gpu(tmp_path: Path) -> None:
    program = compiled(block(), False)
    adaptc.save(insert_kernels(program), tmp_path / "low.pt2")
    with pytest.raises(
        BackendError, match=r"low\.pt2 holds fused kernels, which run on a GPU.*before adaptc\.debug\.lower"
    ):
        adaptc.load(tmp_path / "low.pt2")
    adaptc.save(program, tmp_path / "plain.pt2")
    assert_close(adaptc.load(tmp_path / "plain.pt2")(random_rows(2)), program(random_rows(2)))


@pytest.mark.long
def test_where_kernels_run() -> None:
    """Interpreted: files of lowered programs, and programs in all their forms."""
    run_cases("lowering")
