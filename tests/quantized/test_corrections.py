"""Corrections beside requantised weights: as near as their rank allows, a part of the graph, and undone to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import LoHaConfig, LoraConfig
from adaptc.errors import ConfigError, MergeError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.saved_programs import check_read_without_adaptc

IDS = torch.arange(21).reshape(3, 7) % 19
TARGETS = ["words", "mix", "up", "down"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False),
    "dora": LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["mix", "up", "down"], init_weights=False),
}


class Net(nn.Module):
    """An embedding and a GPT-2 layer, which are stored transposed, a convolution, and a layer that is not quantised."""

    def __init__(self, scheme: str = "nf4", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.mix = nn.Embedding(19, 22), nn.Conv1d(22, 14, 3, padding=1)
        self.up, self.down = Conv1D(34, 14), nn.Linear(34, 5)
        self.up.weight.data.normal_(std=0.2)
        adaptc.quantize(self.to(dtype), scheme, target_modules=["words", "mix", "up"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(self.mix(self.words(ids).mT)).mT.contiguous())))


def program(config: str = "lora", *args: Any, **options: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(5)
    return adaptc.compile(Net(*args), CONFIGS[config], example_inputs=IDS, **options)


def corrected_weight(merged: adaptc.AdaptedProgram, name: str) -> Tensor:
    """The weight and its correction, as the graph's own tensors give them."""
    weight = merged.state_dict[f"{name}.weight"].dequantize()
    tensors = {n.removeprefix(f"{name}."): t for n, t in merged.state_dict.items() if n.startswith(f"{name}.lora_")}
    a, b = (next(t for n, t in tensors.items() if n.startswith((f"lora_{x}", f"lora_embedding_{x}"))) for x in "AB")
    return weight + (torch.einsum("or,rik->oik", b.squeeze(-1), a) if name == "mix" else (b @ a).T)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("rank", [1, 5])
def test_what_is_left_is_the_smallest(rank, scheme, name):
    """Codes are those without a correction, and the error is the singular values after those of its rank."""
    prog = program(name, scheme)
    expected = prog(IDS)
    exact, plain = adaptc.merge(prog, dequantize=True), adaptc.merge(prog, requantize=True)
    merged = adaptc.merge(prog, requantize=True, correction_rank=rank)
    rows = {s.fqn: s for s in merged.merge_report.sites}
    for layer in ("words", "mix", "up"):
        fqn = f"{layer}.weight"
        if fqn not in rows:
            continue
        stored = merged.state_dict[fqn]
        assert isinstance(stored, QuantizedTensor)
        assert all(torch.equal(t, plain.state_dict[fqn].stored[r]) for r, t in stored.stored.items())
        error = (exact.state_dict[fqn] - stored.dequantize()).flatten(1)
        left = (exact.state_dict[fqn] - corrected_weight(merged, layer)).flatten(1)
        torch.testing.assert_close(
            torch.linalg.matrix_norm(left), torch.linalg.svdvals(error)[rank:].norm(), rtol=1e-4, atol=1e-6
        )
        assert rows[fqn].correction_rank == rank
        assert rows[fqn].error == pytest.approx(float(left.abs().max()), rel=1e-3)
        assert rows[fqn].rounding_error == pytest.approx(float(error.abs().max()), rel=1e-4)
    assert rows["down.weight"].correction_rank == 0
    assert "rank" in str(merged.merge_report)
    assert not merged.adaptation.attachments
    assert torch.equal(adaptc.unmerge(merged)(IDS), expected)
    assert torch.equal(prog(IDS), expected)


@pytest.mark.long
@given(st.data())
def test_a_whole_rank_leaves_nothing(data):
    scheme = data.draw(st.sampled_from(["nf4", "int8", "int4"]))
    prog = program(data.draw(st.sampled_from(list(CONFIGS))), scheme)
    merged = adaptc.merge(prog, requantize=True, correction_rank=data.draw(st.integers(34, 90)))
    torch.testing.assert_close(merged(IDS), prog(IDS), rtol=1e-4, atol=1e-5)
    assert merged.merge_report.max_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    prog = program("lora", "nf4", dtype)
    exact = adaptc.merge(prog, dequantize=True)(IDS).float()
    found = [adaptc.merge(prog, requantize=True, correction_rank=r)(IDS).float() for r in (None, 12)]
    errors = [float((f - exact).norm()) for f in found]
    assert errors[1] < 0.4 * errors[0]
    merged = adaptc.merge(prog, requantize=True, correction_rank=2)
    added = [t for n, t in merged.state_dict.items() if ".lora_" in n and t.ndim]
    assert len(added) == 6
    assert {t.dtype for t in added} == {dtype}


@pytest.mark.long
def test_training_programs_and_bases_that_are_given_up():
    prog = program(training=True)
    expected = adaptc.merge(program(), requantize=True, correction_rank=4)(IDS)
    merged = adaptc.merge(prog, requantize=True, correction_rank=4, keep_base=False)
    torch.testing.assert_close(merged(IDS), expected)
    with pytest.raises(MergeError, match="keep_base=False"):
        adaptc.unmerge(merged)


@pytest.mark.long
def test_every_merge_has_its_own_correction():
    """A merged graph is remembered for a set of sites; one with a correction holds tensors of its adapter."""
    prog = program()
    first = adaptc.merge(prog, requantize=True, correction_rank=2)
    before = first(IDS)
    plain, other = adaptc.merge(prog, requantize=True), adaptc.merge(prog, requantize=True, correction_rank=3)
    assert len(plain.state_dict) == len(first.state_dict) - 9 == len(other.state_dict) - 9
    adaptc.swap(prog, {k: 2 * t for k, t in adapter_tensors(prog).items()})
    again = adaptc.merge(prog, requantize=True, correction_rank=2)
    torch.testing.assert_close(again(IDS), adaptc.merge(program_of(prog), requantize=True, correction_rank=2)(IDS))
    assert torch.equal(first(IDS), before)
    assert not torch.allclose(again(IDS), before, rtol=1e-2)


def adapter_tensors(prog: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    return {n.replace(".default", ""): t.detach() for n, t in prog.binding.values.items() if "lora_" in n and t.ndim}


def program_of(prog: adaptc.AdaptedProgram) -> adaptc.AdaptedProgram:
    new = program()
    adaptc.swap(new, adapter_tensors(prog))
    return new


@pytest.mark.long
def test_a_merged_program_takes_another_adapter_and_its_own_correction():
    merged = adaptc.merge(program(), requantize=True, correction_rank=3)
    torch.manual_seed(7)
    again = adaptc.compile(merged, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    exact = adaptc.merge(again, dequantize=True)
    torch.testing.assert_close(exact(IDS), again(IDS), rtol=1e-4, atol=1e-5)
    twice = adaptc.merge(again, requantize=True, correction_rank=14)
    torch.testing.assert_close(twice(IDS), again(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_files_are_read_without_adaptc(tmp_path):
    merged = adaptc.merge(program(), requantize=True, correction_rank=3)
    loaded = check_read_without_adaptc(merged, IDS, tmp_path)
    assert isinstance(loaded.state_dict["up.weight"], QuantizedTensor)


@pytest.mark.long
def test_what_is_refused():
    prog = program()
    for options, said in (
        ({"correction_rank": 3}, "give both"),
        ({"correction_rank": 3, "dequantize": True}, "give both"),
        ({"correction_rank": 0, "requantize": True}, "a positive integer"),
        ({"correction_rank": 1.5, "requantize": True}, "correction_rank"),
    ):
        with pytest.raises(ConfigError, match=said):
            adaptc.merge(prog, **options)
    groups = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2))
    adaptc.quantize(groups, "int8", target_modules=["0"])
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    grouped = adaptc.compile(groups, config, example_inputs=torch.randn(2, 6, 9))
    with pytest.raises(MergeError, match=r"'0.weight\|lora' is a conv1d of several matrices"):
        adaptc.merge(grouped, requantize=True, correction_rank=2)
