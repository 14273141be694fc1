"""Dtypes of base and adapter: slots have the dtypes PEFT gives them, and casts happen where PEFT casts."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import adaptc
from tests.support.cover import examples
from tests.support.custom_models import Autocast, CastLinear, OneLayer
from tests.support.oracle import assert_differs
from tests.support.site_checks import adapter_parameters, assert_valid, without_prefix

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "linear": (lambda: nn.Linear(7, 11), (5, 7)),
    "linear_nobias": (lambda: nn.Linear(13, 5, bias=False), (13,)),
    "addmm": (lambda: Conv1D(11, 7), (3, 7)),
    "embedding": (lambda: nn.Embedding(29, 7), None),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, stride=2), (5, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 7, (3, 5)), (3, 7, 11)),
}


def pair(layer, dtype, autocast, **options):
    """PEFT's model, and the program bound to its adapter."""
    model = OneLayer(layer()).to(dtype).eval()
    config = {"target_modules": ["layer"], "init_lora_weights": False, **options}
    wrapped = peft.get_peft_model(
        OneLayer(layer()).to(dtype).eval(), peft.LoraConfig(**config), autocast_adapter_dtype=autocast
    ).eval()
    wrapped.base_model.model.layer.base_layer.load_state_dict(model.layer.state_dict())
    return model, wrapped, without_prefix(peft.get_peft_model_state_dict(wrapped)), adaptc.LoraConfig(**config)


def inputs(shape, batch, dtype):
    return torch.randint(29, (batch, 5)) if shape is None else torch.randn(batch, *shape).to(dtype)


@pytest.mark.few(11)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
def test_as_peft_to_the_last_bit(name, dtype, autocast):
    layer, shape = LAYERS[name]
    torch.manual_seed(5)
    options = {"fan_in_fan_out": True} if name == "addmm" else {}
    model, wrapped, tensors, config = pair(layer, dtype, autocast, r=3, lora_alpha=7, **options)
    program = adaptc.compile(
        model, config, example_inputs=inputs(shape, 3, dtype), autocast_adapter_dtype=autocast, fuse=False
    )
    assert_valid(program)
    adaptc.swap(program, tensors)
    slots = adapter_parameters(program)
    assert {k: (t.dtype, t.shape) for k, t in slots.items()} == {k: (t.dtype, t.shape) for k, t in tensors.items()}
    assert all(torch.equal(slots[k], tensors[k]) for k in tensors)
    x = inputs(shape, 5, dtype)
    found, expected = program(x), wrapped(x)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


@given(
    sizes=st.tuples(*[st.integers(1, 17)] * 2),
    r=st.integers(1, 19),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.01, 8)),
    rslora=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    autocast=st.booleans(),
    lead=st.lists(st.integers(1, 4), max_size=2),
)
@settings(max_examples=examples(25))
def test_any_shape_rank_and_scale(sizes, r, alpha, rslora, dtype, autocast, lead):
    inner, out = sizes
    options = {"r": r, "lora_alpha": alpha, "use_rslora": rslora}
    model, wrapped, tensors, config = pair(lambda: nn.Linear(inner, out), dtype, autocast, **options)
    x = torch.randn(4, *lead, inner).to(dtype)
    # Fusing folds the scale into B, which rounds in another order.
    options = {"autocast_adapter_dtype": autocast, "dynamic_shapes": None, "form": "apply", "fuse": False}
    program = adaptc.compile(model, config, example_inputs=x, **options)
    adaptc.swap(program, tensors)
    expected = wrapped(x)
    assert torch.equal(program(x), expected)
    program.fuse = True
    rounding = 40 * torch.finfo(dtype).eps * max(1, expected.abs().max().item())
    torch.testing.assert_close(program(x), expected, rtol=0, atol=rounding)
    merged = adaptc.merge(program)
    A, B = (tensors[f"layer.lora_{k}.weight"].double() for k in "AB")
    exact = model.layer.weight.double() + B @ A * (alpha / (r**0.5 if rslora else r))
    found = merged.state_dict["layer.weight"]
    assert found.dtype == dtype
    # One rounding to the dtype, and float32 arithmetic before it.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (dtype != torch.float64) + 1e-13
    assert bool(((found.double() - exact).abs() <= bound * 1.01).all())


@pytest.mark.parametrize("training", [False, True])
def test_a_weight_cast_by_its_layer(training):
    torch.manual_seed(7)
    model, wrapped, tensors, config = pair(lambda: CastLinear(7, 11), torch.float32, True, r=3, lora_alpha=5)
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    program = adaptc.compile(model, config, example_inputs=x, training=training)
    adaptc.swap(program, tensors)
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    assert torch.equal(program(x), wrapped(x))
    assert program(x).dtype == torch.bfloat16
    merged = adaptc.merge(program)
    assert merged.state_dict["layer.weight"].dtype == torch.float32
    torch.testing.assert_close(merged(x), program(x), rtol=0.02, atol=0.02)


@pytest.mark.long
def test_layers_in_an_autocast_region():
    torch.manual_seed(9)
    model = Autocast().eval()
    config = {"target_modules": ["up", "down"], "r": 3, "init_lora_weights": False}
    wrapped = peft.get_peft_model(Autocast().eval(), peft.LoraConfig(**config))
    for name in ("up", "down"):
        getattr(wrapped.base_model.model, name).base_layer.load_state_dict(getattr(model, name).state_dict())
    program = adaptc.compile(model, adaptc.LoraConfig(**config), example_inputs=torch.randn(3, 7))
    assert_valid(program)
    adaptc.swap(program, without_prefix(peft.get_peft_model_state_dict(wrapped)))
    x = torch.randn(5, 7)
    torch.testing.assert_close(program(x), wrapped(x), rtol=0.02, atol=0.02)
    assert_differs(program(x), model(x), at_least=0.1)
    merged = adaptc.merge(program)
    assert_valid(merged)
    assert torch.equal(merged(x), program(x))
    assert torch.equal(adaptc.unload(program)(x), model(x))
