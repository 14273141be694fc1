"""Options that some sites cannot have, and combinations: refused by name where they have no meaning, else PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, SwapError, TargetError
from tests.support.custom_models import Attention, Bilinear, Mixture, Net, OneLayer, Recurrent, WeightInsideBlock
from tests.support.oracle import assert_same, quiet
from tests.support.site_cases import LORA, floats, ids
from tests.support.site_checks import adapter_parameters, assert_close, assert_valid, without_prefix

#: its time, in a loop
pytestmark = pytest.mark.filterwarnings("ignore:Recurrent was captured for some sizes alone")

DROPPED = {
    "lstm": (lambda: Recurrent(nn.LSTM(7, 5, batch_first=True)), floats(3, 7), {"target_modules": ["rnn"]}),
    "transposed": (lambda: OneLayer(nn.ConvTranspose1d(5, 7, 3)), floats(5, 11), {"target_modules": ["layer"]}),
    "bilinear": (
        Bilinear,
        lambda b: (torch.randn(b, 5).double(), torch.randn(b, 7).double()),
        {"target_modules": ["layer"]},
    ),
    "experts": (lambda: Mixture(True), floats(7), {"target_modules": [], "target_parameters": ["experts.down"]}),
    "function": (WeightInsideBlock, floats(7), {"target_modules": [], "target_parameters": ["by_matmul"]}),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning")
@pytest.mark.parametrize("name", list(DROPPED))
@pytest.mark.parametrize("option", [{"lora_dropout": 0.3}, {"lora_bias": True}], ids=["dropout", "bias"])
def test_refused_where_the_changed_weight_is_read(name, option):
    build, inputs, target = DROPPED[name]
    with pytest.raises((ConfigError, TargetError), match=next(iter(option))):
        adaptc.compile(build().double(), LoraConfig(**target, **option), example_inputs=inputs(3))


REFUSED = {
    "lora_bias on an embedding": (Net, ids(5, 29), {"target_modules": ["embed"], "lora_bias": True}, "lora_bias"),
    "lora_bias in attention": (
        Attention,
        floats(5, 15),
        {"target_modules": ["self_attn"], "lora_bias": True},
        "MultiheadAttention",
    ),
    "a module and its parameter": (
        Net,
        ids(5, 29),
        {"target_modules": ["up"], "target_parameters": ["up.weight"]},
        "'up.weight' is adapted twice",
    ),
    "attention and its projection": (
        Attention,
        floats(5, 15),
        {"target_modules": ["self_attn", "out_proj"]},
        "out_proj.weight' is adapted twice",
    ),
    "rows of a saved embedding": (
        Net,
        ids(5, 29),
        {"target_modules": ["up"], "modules_to_save": ["embed"], "trainable_token_indices": {"embed": [3]}},
        "'embed.weight' is adapted twice",
    ),
    "rows of an adapted embedding": (
        Net,
        ids(5, 29),
        {"target_modules": ["embed"], "trainable_token_indices": {"embed": [3]}},
        "'embed.weight' is adapted twice",
    ),
    "a rank that groups do not divide": (
        lambda: OneLayer(nn.Conv1d(6, 9, 3, groups=3)),
        floats(6, 11),
        {"target_modules": ["layer"], "r": 4},
        "r=6 fits",
    ),
    "a parameter of one axis": (Net, ids(5, 29), {"target_parameters": ["norm.weight"]}, "norm.weight"),
    "a parameter that is not there": (Net, ids(5, 29), {"target_parameters": ["up.wieght"]}, "up.weight"),
    "a norm": (Net, ids(5, 29), {"target_modules": ["norm"]}, "LayerNorm"),
    "a pattern that matches nothing": (
        Net,
        ids(5, 29),
        {"target_modules": ["up"], "alpha_pattern": {"down": 3}},
        "alpha_pattern",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name):
    build, inputs, options, says = REFUSED[name]
    model = build().double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ConfigError, TargetError), match=says):
        adaptc.compile(model, LoraConfig(**options), example_inputs=inputs(3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


COMBINED = {
    "all biases and a saved head": (
        Net,
        ids(5, 29),
        {"bias": "all", "modules_to_save": ["classifier"]},
        ["up", "down"],
    ),
    "biases of attention": (Attention, floats(5, 15), {"bias": "all"}, ["self_attn"]),
    "biases of adapted attention": (Attention, floats(5, 15), {"bias": "lora_only"}, ["self_attn", "out"]),
    "a saved layer and rows": (
        Net,
        ids(5, 29),
        {"modules_to_save": ["norm"], "trainable_token_indices": {"embed": [0, 28]}, "use_rslora": True},
        ["dense"],
    ),
    "fan_in_fan_out of a plain layer": (Net, ids(5, 29), {"fan_in_fan_out": True}, ["up"]),
    "dropout in inference": (Net, ids(5, 29), {"lora_dropout": 0.4}, ["up", "embed"]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", list(COMBINED))
def test_combined_as_in_peft(name, tmp_path):
    build, inputs, options, targets = COMBINED[name]
    torch.manual_seed(13)
    model = build().double().eval()
    twin = build().double().eval()
    twin.load_state_dict(model.state_dict())
    x = inputs(5)
    with quiet("fan_in_fan_out is set to True.*"):
        wrapped = peft.get_peft_model(twin, peft.LoraConfig(**LORA, target_modules=targets, **options)).eval()
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p))
        wrapped.save_pretrained(str(tmp_path / "a"))
        program = adaptc.compile(model, tmp_path / "a", example_inputs=inputs(3))
        assert_valid(program)
        assert_close(program(*x), wrapped(*x), 1e-9)
        assert not torch.allclose(program(*x), model(*x), rtol=0.01)
        merged = adaptc.merge(program)
        assert_valid(merged)
        assert_close(merged(*x), program(*x), 1e-9)
        # Weights that want gradients take other kernels.
        assert torch.equal(adaptc.unload(program)(*x), copy.deepcopy(model).requires_grad_(False)(*x))
        adaptc.save_adapter(program, tmp_path / "b")
        fresh = build().double().eval()
        fresh.load_state_dict(model.state_dict())
        again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "b")).eval()
    assert_close(again(*x), wrapped(*x), 1e-9)


def test_a_bias_that_two_layers_share_is_untied_by_a_merge():
    class SharedBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(7, 11), nn.Linear(11, 11)
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model, x = SharedBias().double().eval(), torch.randn(5, 7).double()
    program = adaptc.compile(
        model, LoraConfig(**LORA, target_modules=["first"], lora_bias=True), example_inputs=torch.randn(3, 7).double()
    )
    adapted = program(x)
    merged = adaptc.merge(program)
    assert_valid(merged)
    assert_close(merged(x), adapted)
    assert torch.equal(merged.state_dict["second.bias"], model.second.bias)
    assert not torch.equal(merged.state_dict["first.bias"], model.first.bias)


def test_a_bias_of_the_adapter_becomes_one_of_the_layer():
    model, x = Net().double().eval(), ids(5, 29)(5)
    program = adaptc.compile(
        model, LoraConfig(**LORA, target_modules=["down"], lora_bias=True), example_inputs=ids(5, 29)(3)
    )
    merged = adaptc.merge(program)
    assert_valid(merged)
    change = adapter_parameters(program)["down.lora_B.bias"] * 5 / 3
    assert_close(merged.state_dict["down.bias"].detach(), change.detach())
    assert_close(merged(*x), program(*x))
    assert "down.bias" not in adaptc.unload(program).state_dict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_half_precision_are_rounded_once(dtype, transposed):
    """PEFT rounds the factors to the dtype of the experts first; here only the sum is rounded."""
    torch.manual_seed(17)
    model = Mixture(transposed).to(dtype).eval()
    config = {
        "target_modules": [],
        "target_parameters": ["experts.up", "experts.down"],
        "r": 3,
        "init_lora_weights": False,
    }
    twin = Mixture(transposed).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    wrapped = peft.get_peft_model(twin, peft.LoraConfig(**config)).eval()
    tensors = without_prefix(peft.get_peft_model_state_dict(wrapped))
    x = torch.randn(5, 7).to(dtype)
    program = adaptc.compile(model, LoraConfig(**config), example_inputs=x[:3])
    adaptc.swap(program, tensors)
    assert {t.dtype for t in adapter_parameters(program).values()} == {t.dtype for t in tensors.values()}
    merged = adaptc.merge(program)
    assert torch.equal(merged(x), program(x))
    reference = copy.deepcopy(model).double()
    keys = {"experts.up": "experts.base_layer", "experts.down": "experts"}
    for fqn, key in keys.items():
        A, B = (tensors[f"{key}.lora_{k}.weight"].double() for k in "AB")
        delta = torch.einsum("ore,eri->eoi", B.reshape(B.shape[0], -1, 3), A.reshape(3, -1, A.shape[1])) * 8 / 3
        exact = model.get_parameter(fqn).double() + (delta.mT if transposed else delta)
        bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6
        assert bool(((merged.state_dict[fqn].double() - exact).abs() <= bound).all())
        reference.get_parameter(fqn).data = exact
    # The input, the weights, the products and the sums are rounded, each by half of an eps of its own size.
    for found in (program(x), wrapped(x)):
        assert_same(found.double(), reference(x.double()), 2 * torch.finfo(dtype).eps)


@pytest.mark.long
def test_adapters_that_treat_one_weight_differently_share_a_program():
    """Each leaves the other's sites alone: LoRA on an embedding, rows of it, and a copy of it."""
    torch.manual_seed(19)
    model, x = Net().double().eval(), ids(5, 29)(4)
    configs = [
        LoraConfig(**LORA, target_modules=["embed", "up"]),
        LoraConfig(**LORA, target_modules=["down"], trainable_token_indices={"embed": [0, 3, 17, 28]}),
        LoraConfig(**LORA, target_modules=["down"], modules_to_save=["embed"]),
    ]
    program = adaptc.compile(model, configs, example_inputs=ids(5, 29)(3))
    for config in configs:
        alone = adaptc.compile(model, config, example_inputs=ids(5, 29)(3))
        with torch.no_grad():
            for p in adapter_parameters(alone).values():
                p.copy_(torch.randn_like(p))
        adaptc.swap(program, {k: v.detach() for k, v in adapter_parameters(alone).items()}, config=config)
        assert_valid(program)
        assert_close(program(*x), alone(*x))
        assert_close(adaptc.merge(program)(*x), alone(*x))


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "names"),
    [({"bias": "lora_only"}, "up.base_layer.bias"), ({"modules_to_save": ["norm"]}, "norm.weight")],
    ids=["bias", "module"],
)
def test_what_the_program_has_no_place_for_is_not_dropped(more, names, tmp_path):
    """The base has tensors of these names, and an adapter may not change them on the side."""
    model, x = Net().double().eval(), ids(5, 29)(3)
    config = LoraConfig(**LORA, target_modules=["up"])
    adaptc.save_adapter(adaptc.compile(model, config.replace(**more), example_inputs=x), tmp_path)
    program = adaptc.compile(model, config, example_inputs=x)
    before = program(*x)
    with pytest.raises(SwapError, match=names):
        adaptc.swap(program, tmp_path)
    assert torch.equal(program(*x), before)
