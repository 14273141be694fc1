"""nn.MultiheadAttention: one wrapper in PEFT's files, two weights in the program, in train and in eval mode."""

from __future__ import annotations

import pytest

from tests.custom_models import ATTENTION
from tests.site_checks import every_check, subject


@every_check(ATTENTION)
def test_site(name, check, tmp_path):
    check(subject(name), tmp_path)


@pytest.mark.parametrize("name", ["mha", "mha_nobias"])
def test_keys_are_those_of_peft(name):
    keys = {k.removeprefix("base_model.model.") for k in subject(name).file}
    expected = {f"self_attn.{w}lora_{x}.weight" for w in ("", "base_layer.out_proj.") for x in "AB"}
    assert keys - {"out.lora_A.weight", "out.lora_B.weight"} == expected
