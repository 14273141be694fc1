"""Merges into quantised weights: three ways, each with its error, and each undone to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoHaConfig, LoraConfig
from adaptc.errors import ConfigError, MergeError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.saved_programs import check_read_without_adaptc

X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16)
WAYS = [{"dequantize": True}, {"requantize": True}, {"keep": "residual"}]
CONFIGS = [
    LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False),
    LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False, use_dora=True),
    LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False),
]


class Net(nn.Module):
    """``up`` is quantised, and ``down`` is not."""

    def __init__(self, scheme: str = "int8") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 7)
        adaptc.quantize(self, scheme, exclude=["down"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def program(config: object = CONFIGS[0], scheme: str = "int8") -> adaptc.AdaptedProgram:
    torch.manual_seed(5)
    return adaptc.compile(Net(scheme), config, example_inputs=X)


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "dora", "loha"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: next(iter(w)))
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_each_way(way, config, scheme):
    prog = program(config, scheme)
    expected, weights = prog(X), dict(prog.state_dict)
    merged = adaptc.merge(prog, **way)
    up, report = merged.state_dict["up.weight"], merged.merge_report
    error = {"int8": 0.05, "nf4": 0.7}[scheme] if "requantize" in way else 1e-5
    assert float((merged(X) - expected).abs().max()) < error
    assert isinstance(up, QuantizedTensor) == ("dequantize" not in way)
    assert not isinstance(merged.state_dict["down.weight"], QuantizedTensor)
    assert [s.fqn for s in report.sites] == (["down.weight"] if "keep" in way else ["up.weight", "down.weight"])
    if "requantize" in way:
        assert up.scheme == weights["up.weight"].scheme
        exact = adaptc.merge(prog, dequantize=True).state_dict["up.weight"]
        row = report.sites[0]
        assert row.error == pytest.approx(float((up.dequantize() - exact).abs().max()), rel=1e-5)
        assert row.error > 0
    if "keep" in way:
        assert up is weights["up.weight"]
    assert torch.equal(adaptc.unmerge(merged)(X), expected)
    assert all(t is weights[n] for n, t in prog.state_dict.items())
    again = adaptc.merge(prog, **way)
    assert torch.equal(again(X), merged(X))


def test_the_ways_are_told_apart_where_a_merge_is_remembered():
    """A merged graph is made once for a set of sites, whatever becomes of the weights."""
    prog = program()
    kinds = [type(adaptc.merge(prog, **way).state_dict["up.weight"]) for way in (*WAYS[:2], *WAYS[:2])]
    assert kinds == [nn.Parameter, kinds[1], nn.Parameter, kinds[1]]
    assert isinstance(adaptc.merge(prog, **WAYS[1]).state_dict["up.weight"], QuantizedTensor)


def test_a_way_must_be_chosen_and_only_one():
    prog = program()
    with pytest.raises(MergeError, match=r"'up.weight\|lora' and 0 more.*int8.*dequantize=True or requantize=True or"):
        adaptc.merge(prog)
    with pytest.raises(ConfigError, match="dequantize=True and requantize=True exclude each other"):
        adaptc.merge(prog, dequantize=True, requantize=True)
    with pytest.raises(ConfigError, match="keep"):
        adaptc.merge(prog, keep="everything")
    plain = adaptc.compile(Net(), LoraConfig(r=2, target_modules=["down"]), example_inputs=X)
    assert torch.equal(adaptc.merge(plain)(X), plain(X))  # B is zero, and no quantised weight changes


@pytest.mark.parametrize("way", WAYS, ids=lambda w: next(iter(w)))
def test_a_merged_program_takes_another_adapter(way):
    merged = adaptc.merge(program(), **way)
    again = adaptc.compile(merged, LoraConfig(r=2, target_modules=["up"]))
    torch.testing.assert_close(again(X), merged(X))
    assert again.adaptation.attachments[0].adapter == "default"


@pytest.mark.parametrize("way", WAYS, ids=lambda w: next(iter(w)))
def test_the_base_may_be_given_up(way):
    prog = program()
    expected = adaptc.merge(prog, **way)(X)
    merged = adaptc.merge(prog, keep_base=False, **way)
    assert torch.equal(merged(X), expected)
    with pytest.raises(MergeError, match="keep_base=False"):
        adaptc.unmerge(merged)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, ids=lambda w: next(iter(w)))
def test_files_are_read_without_adaptc(way, tmp_path):
    merged = adaptc.merge(program(scheme="nf4"), **way)
    loaded = check_read_without_adaptc(merged, X, tmp_path)
    found, before = loaded.state_dict["up.weight"], merged.state_dict["up.weight"]
    assert type(found) is type(before)
    if isinstance(before, QuantizedTensor):
        assert found.scheme == before.scheme
        assert all(torch.equal(t, before.stored[role]) for role, t in found.stored.items())


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "nf4"])
def test_verification_merges_without_rounding(scheme):
    report = adaptc.verify(program(scheme=scheme), Net(scheme))
    assert report.ok, str(report)


def test_bound_forms(tmp_path):
    """By default an adapter is bound beside quantised weights; on request it gets plain weights of its own."""
    prog = program()
    path = str(adaptc.save_adapter(prog, tmp_path))
    expected = prog(X)
    for form in ("auto", "apply", "weight"):
        runner = prog.bind(path, form=form)
        torch.testing.assert_close(runner(X), expected, rtol=1e-5, atol=1e-5)
        assert (runner.form == "weight") == (form == "weight")
    assert isinstance(prog.state_dict["up.weight"], QuantizedTensor)
