"""nn.MultiheadAttention: one wrapper in PEFT's files, two weights in the program, in train and in eval mode."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.support.custom_models import Attention
from tests.support.site_cases import ATTENTION, floats
from tests.support.site_checks import assert_close, assert_valid, changed_by, parametrize_checks, subject


@pytest.mark.few(9)
@parametrize_checks(ATTENTION)
def test_site(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


@pytest.mark.parametrize("name", ["mha", "mha_nobias"])
def test_keys_are_those_of_peft(name):
    keys = {k.removeprefix("base_model.model.") for k in subject(name).file}
    expected = {f"self_attn.{w}lora_{x}.weight" for w in ("", "base_layer.out_proj.") for x in "AB"}
    assert keys - {"out.lora_A.weight", "out.lora_B.weight"} == expected


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_captured_in_either_mode(training, mode):
    """PEFT's eval mode takes a fast path of torch, its train mode does not; the program is one and the same."""
    s = subject("mha")
    program = adaptc.compile(s.base, s.directory, example_inputs=s.case.args(3), training=training)
    assert_valid(program)
    x = s.case.args(4)
    getattr(s.oracle.model, mode)()
    try:
        expected = s.oracle(*x)
    finally:
        s.oracle.model.eval()
    module = program.module()
    if training:
        getattr(module, mode)()
    assert_close(module(*x), expected)
    assert_close(program(*x), expected)


def test_dropout_acts_on_the_input_of_each_projection():
    """PEFT merges the weights for each call, and so never drops anything."""
    model = Attention().double()
    config = {"target_modules": ["self_attn"], "r": 3, "init_lora_weights": False, "lora_dropout": 0.5}
    x = floats(5, 15)(4)
    program = adaptc.compile(model, adaptc.LoraConfig(**config), example_inputs=floats(5, 15)(3), training=True)
    module = program.module()
    module.train()
    assert not torch.allclose(module(*x), module(*x))
    module.eval()
    assert torch.equal(module(*x), module(*x))
    assert_close(adaptc.merge(program)(*x), module(*x))
