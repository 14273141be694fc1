"""``adaptc.quantize``: which weights, in a model or in a program, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, TargetError
from adaptc.passes.quantized.all_schemes import SCHEME_NAMES
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.families import FAMILIES
from tests.support.oracle import assert_differs, assert_same, run, shared_base_program

LORA = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)
        self.table = nn.Embedding(7, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x + self.table.weight.mean(0))))


def quantized_names(state: dict[str, object]) -> set[str]:
    return {n for n, t in state.items() if isinstance(t, QuantizedTensor)}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_a_program_and_a_model_are_quantized_alike(family, scheme):
    model = FAMILIES[family].build()
    program = adaptc.quantize(adaptc.compile(shared_base_program(family), LORA), scheme)
    assert adaptc.quantize(model, scheme) is model
    rows = {w.fqn: w for w in program.quantize_report.weights}
    assert rows == {w.fqn: w for w in model.quantize_report.weights}
    adapted = {a.fqn for a in program.adaptation.attachments}
    assert rows.keys() == adapted == quantized_names(program.state_dict) == quantized_names(dict(model.state_dict()))
    other = adaptc.compile(model, LORA)
    adaptc.swap(other, save(program))
    assert_same(run(program, FAMILIES[family], 3, 7), run(other, FAMILIES[family], 3, 7))
    report = program.quantize_report
    assert 0 < report.max_error < 0.2
    assert report.bytes_after == sum(program.state_dict[n].stored_bytes for n in rows)
    assert report.bytes_before == sum(program.state_dict[n].numel() * 4 for n in rows)
    assert report.to_dict()["weights"][0]["weight"] in rows


def save(program: adaptc.AdaptedProgram) -> str:
    import tempfile

    return str(adaptc.save_adapter(program, tempfile.mkdtemp()))


def test_the_program_that_was_quantized_stays():
    program = adaptc.compile(Net(), LoraConfig(r=2, target_modules=["up"]), example_inputs=X)
    before = program(X)
    made = adaptc.quantize(program, "int8")
    assert torch.equal(program(X), before)
    assert not quantized_names(program.state_dict)
    assert program.quantize_report is None
    assert_differs(made(X), before, 1e-4)
    assert made.with_options(fuse=False).quantize_report is made.quantize_report


def test_targets_and_exclusions():
    def names(**options: object) -> set[str]:
        return quantized_names(dict(adaptc.quantize(Net(), "int8", **options).state_dict()))

    assert names() == {"up.weight", "down.weight"}
    assert names(exclude=["down"]) == {"up.weight"}
    assert names(target_modules=["table", "up"]) == {"up.weight", "table.weight"}
    assert names(target_modules=".*own") == {"down.weight"}
    assert quantized_names(
        adaptc.quantize(adaptc.compile(Net(), LORA, example_inputs=X), "int8", exclude=["up"]).state_dict
    ) == {"down.weight"}


@pytest.mark.long
def test_a_tied_head_stays_and_a_tied_embedding_stays_tied():
    program = adaptc.quantize(shared_base_program("gpt2"), "int8")
    assert "transformer.wte.weight" not in quantized_names(program.state_dict)
    model = FAMILIES["gpt2"].build()
    adaptc.quantize(model, "int8", target_modules=["wte"])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    found = adaptc.compile(model, LoraConfig(r=2, target_modules=["c_attn"]))
    assert found.state_dict["lm_head.weight"] is found.state_dict["transformer.wte.weight"]
    assert_same(run(found, FAMILIES["gpt2"]), run(model, FAMILIES["gpt2"]))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"scheme": "int5"}, ConfigError, "int5.*is not one of int8"),
        ({"scheme": "int4", "group_size": 5}, ConfigError, "'up.weight'.*5 does not divide the 16.*4 would"),
        ({"scheme": "int8", "target_modules": ["nope"]}, TargetError, "nope"),
        ({"scheme": "int8", "exclude": ["nope"]}, TargetError, "nope"),
    ],
)
def test_refusals_change_nothing(options, error, reason):
    model = Net()
    before = dict(model.named_parameters())
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=X)
    for subject in (model, program):
        with pytest.raises(error, match=reason):
            adaptc.quantize(subject, **options)
    assert all(t is before[n] for n, t in model.named_parameters())
    assert not quantized_names(program.state_dict)


def test_what_is_quantized_already_and_what_is_no_model():
    model = adaptc.quantize(Net(), "int8", target_modules=["up"])
    with pytest.raises(ConfigError, match=r"'up.weight' is quantised already, by int8.*exclude"):
        adaptc.quantize(model, "nf4")
    with pytest.raises(ConfigError, match=r"'up.weight' is torch.float64"):
        adaptc.quantize(Net().double(), "int8")
    with pytest.raises(ConfigError, match="not a dict"):
        adaptc.quantize({}, "int8")  # type: ignore[type-var]


def test_an_adapter_that_changed_the_base():
    program = adaptc.compile(Net(), LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"), example_inputs=X)
    with pytest.raises(ConfigError, match=r"initialisation changed.*'up.weight'.*unload"):
        adaptc.quantize(program, "int8")


@pytest.mark.long
def test_a_generator():
    model = FAMILIES["llama"].build()
    gen = adaptc.quantize(adaptc.compile_for_generation(model, LORA), "int8")
    stored = adaptc.compile_for_generation(adaptc.quantize(copy.deepcopy(model), "int8"), save(gen.program))
    ids = torch.tensor([[5, 9, 11, 6]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(gen.generate(ids, **options), stored.generate(ids, **options))
    assert gen.program.quantize_report.weights


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_2", "olora"])
def test_first_values_that_change_the_base_are_refused(scheme, tmp_path):
    """The quantised weight would silently become a plain one."""
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=scheme)
    path = adaptc.save_adapter(adaptc.compile(Net(), config, example_inputs=X), tmp_path / "adapter")
    net = adaptc.quantize(Net(), "nf4")
    for adapter in (config, path):
        with pytest.raises(ConfigError, match=r"change the base weight 'up.weight', which is quantised"):
            adaptc.compile(net, adapter, example_inputs=X)
    program = adaptc.compile(net, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), example_inputs=X)
    before = program(X)
    with pytest.raises(ConfigError, match="which is quantised"):
        adaptc.swap(program, path)
    assert torch.equal(program(X), before)
    assert isinstance(program.state_dict["up.weight"], QuantizedTensor)
