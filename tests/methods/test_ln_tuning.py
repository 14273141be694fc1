"""Modules trained as whole copies: PEFT's outputs, gradients, files and merged weights, at modules of any type."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc import LNTuningConfig
from adaptc.errors import CheckpointError, ConfigError, SwapError, TargetError
from tests.support.custom_models import Attention, Net
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_differs, assert_same, file_tensors, quiet, run
from tests.support.site_checks import assert_close, assert_valid, without_prefix

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

X = torch.tensor([[3, 8, 28, 1, 3], [0, 2, 8, 5, 8], [9, 4, 4, 27, 6]])


def wrapped(model, **config):
    """PEFT's model with every trained tensor moved."""
    with quiet():
        model = peft.get_peft_model(model, peft.LNTuningConfig(**config)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def net():
    torch.manual_seed(4)
    return Net().eval()


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_default_norms_of_families(name, tmp_path):
    oracle = Oracle.wrap_and_save(name, peft.LNTuningConfig(), tmp_path / "peft")
    model = FAMILIES[name].build()
    program = adaptc.compile(model, LNTuningConfig())
    assert_valid(program)
    assert set(program.binding.config.target_modules) == set(oracle.model.peft_config["default"].target_modules)
    assert_same(run(program, oracle.family), oracle.base_output())
    oracle.check_trained(program, tmp_path / "ours")
    assert_differs(oracle(), oracle.base_output())
    adaptc.swap(program, oracle.path)
    assert_same(run(program, oracle.family), oracle())
    oracle.check_merged(program)
    assert_same(run(adaptc.unload(program), oracle.family), oracle.base_output())


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["norm"]},
        {"target_modules": ["up", "down"]},  # layers like any other
        {"target_modules": ["embed"]},
        {"target_modules": ["batch"]},  # with running statistics, and a count that inference does not read
        {"target_modules": ["classifier"]},  # a container
        {"target_modules": ["classifier", "norm"], "exclude_modules": ["norm"]},
        {"target_modules": r"norm|classifier\..*"},
        {"target_modules": "all-linear"},
        {"target_modules": ["norm"], "modules_to_save": ["classifier"]},
    ],
    ids=str,
)
def test_modules_of_any_type(config, tmp_path):
    model = wrapped(net(), **config)
    model.save_pretrained(str(tmp_path / "peft"))
    base, expected = net()(X), model(X)
    program = adaptc.compile(net(), LNTuningConfig(**config), example_inputs=X)
    assert_valid(program)
    assert_close(program(X), base, 1e-6)
    ours = file_tensors(adaptc.save_adapter(program, tmp_path / "fresh"))
    theirs = file_tensors(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    adaptc.swap(program, tmp_path / "peft")
    assert_valid(program)
    assert_close(program(X), expected, 1e-5)
    assert not torch.allclose(expected, base, atol=1e-2)
    merged = adaptc.merge(program)
    assert_close(merged(X), expected, 1e-5)
    ours = file_tensors(adaptc.save_adapter(program, tmp_path / "ours"))
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    assert_close(again(X), expected, 1e-5)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_close(loaded(X), expected, 1e-5)
    assert file_tensors(adaptc.save_adapter(loaded, tmp_path / "loaded")).keys() == theirs.keys()


def test_modules_that_own_projections(tmp_path):
    """MultiheadAttention reads the parameters of its out_proj itself."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, 5, 15)
    program = adaptc.compile(model, LNTuningConfig(target_modules=["self_attn"]), example_inputs=x)
    assert_close(program(x), model(x), 1e-6)
    twin = wrapped(Attention().eval(), target_modules=["self_attn"])
    values = {k: torch.randn_like(v) for k, v in without_prefix(peft.get_peft_model_state_dict(twin)).items()}
    assert len(values) == 4
    adaptc.swap(program, values)
    inner = {k.replace(".ln_tuning_layers", "").replace(".default", ""): v for k, v in values.items()}
    assert_close(program(x), torch.func.functional_call(model, inner, (x,)), 1e-5)


@pytest.mark.long
def test_one_tensor_under_two_names(tmp_path):
    """BERT's head has its bias under two names. PEFT trains such a head, and cannot save it."""
    family, config = FAMILIES["bert"], {"target_modules": ["cls.predictions", "attention.output.LayerNorm"]}
    model = wrapped(family.build(), **config)
    tensors = without_prefix(peft.get_peft_model_state_dict(model))
    program = adaptc.compile(family.build(), LNTuningConfig(**config))
    assert {k for k in tensors if k.endswith(("predictions.ln_tuning_layers.bias", "decoder.bias"))}
    adaptc.swap(program, tensors)
    assert_same(run(program, family), run(model, family))
    odd = {k: v + k.endswith("decoder.bias") for k, v in tensors.items()}
    with pytest.raises(CheckpointError, match=r"decoder\.bias.*differ"):
        adaptc.swap(program, odd)
    saved = adaptc.save_adapter(program, tmp_path)
    again = adaptc.compile(family.build(), saved)
    assert_same(run(again, family), run(model, family))


def test_running_statistics_are_trained_apart_from_the_model(tmp_path):
    model, x = net().train(), torch.randint(29, (8, 5))
    twin = peft.get_peft_model(net().train(), peft.LNTuningConfig(target_modules=["batch", "norm"])).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = LNTuningConfig(target_modules=["batch", "norm"])
    program = adaptc.compile(model, config, example_inputs=torch.randint(29, (4, 5)), training=True)
    module = program.module()
    module.train()
    for _ in range(3):
        assert_close(module(x), twin(x), 1e-5)
    found = load_file(adaptc.save_adapter(program, tmp_path) / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(twin)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, 1e-5)
    assert found["base_model.model.batch.ln_tuning_layers.num_batches_tracked"] == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_adapters_of_other_modules(tmp_path):
    for name in ("norm", "batch"):
        wrapped(net(), target_modules=[name]).save_pretrained(str(tmp_path / name))
    expected = {n: peft.PeftModel.from_pretrained(net(), str(tmp_path / n)).eval()(X) for n in ("norm", "batch")}
    program = adaptc.compile(net(), [tmp_path / "norm", tmp_path / "batch"], example_inputs=X)
    for name in ("norm", "batch", "norm"):
        adaptc.swap(program, tmp_path / name)
        assert_valid(program)
        assert_close(program(X), expected[name], 1e-5)
    alone = adaptc.compile(net(), tmp_path / "norm", example_inputs=X)
    with pytest.raises(SwapError, match="batch"):
        adaptc.swap(alone, tmp_path / "batch")
    assert_close(alone(X), expected["norm"], 1e-5)


def test_half_precision_stays():
    """A copy has the dtype of its module, as PEFT's has."""
    program = adaptc.compile(net().bfloat16(), LNTuningConfig(target_modules=["norm"]), example_inputs=X)
    slots = [p for p in program.module().parameters() if p.requires_grad]
    assert [p.dtype for p in slots] == [torch.bfloat16] * 4
    assert torch.equal(program(X), net().bfloat16()(X))


@pytest.mark.parametrize("bare_program", [False, True])
def test_unknown_architectures_have_their_layer_norms_trained(bare_program):
    model, inputs = FAMILIES["smollm3"].build(), FAMILIES["smollm3"].inputs(2, 5)
    if bare_program:
        model.config.use_cache = False
        with torch.no_grad():
            model = torch.export.export(model, (), inputs, strict=False)
    program = adaptc.compile(model, LNTuningConfig())
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    assert sorted(program.binding.config.target_modules) == sorted(names)
    assert {a.module.rpartition(".")[2] for a in program.adaptation.attachments} == set(names)


def test_name_of_a_norm_that_another_module_has():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.ModuleDict(), torch.nn.ModuleDict()
            self.first["x"], self.second["x"] = torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)

        def forward(self, x):
            return self.second["x"](self.first["x"](x))

    program = adaptc.compile(Named(), LNTuningConfig(), example_inputs=torch.randn(2, 5))
    assert program.binding.config.target_modules == ["first.x"]


def test_refusals():
    with pytest.raises(ConfigError, match="target_parameters"):
        LNTuningConfig(target_parameters=["up.weight"])
    with pytest.raises(TargetError, match=r"nrm.*norm"):
        adaptc.compile(net(), LNTuningConfig(target_modules=["nrm"]), example_inputs=X)
    with pytest.raises(TargetError, match="LN_TUNING"):
        adaptc.compile(torch.nn.Linear(3, 5), LNTuningConfig(), example_inputs=torch.randn(2, 3))
