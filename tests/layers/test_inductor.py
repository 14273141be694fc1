"""Kinds of sites whose slots have sizes tied to one another, compiled once with inductor and swapped to other ranks."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.support.site_cases import CASES
from tests.support.site_checks import adapter_parameters, assert_close, assert_valid, subject

NAMES = [
    "linear_rank_one",
    "embedding_padding",
    "conv2d",
    "conv2d_groups",
    "conv2d_depthwise",
    "lora_bias_groups",
    "experts_both",
    "experts_one_t",
    "functions",
    "tokens",
    "tokens_functional_head",
    "save_batch_norm",
]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_once_for_every_rank(name):
    s = subject(name)
    args = s.case.args(5)
    layer = getattr(s.base, "layer", None)
    groups = getattr(layer, "groups", 1)
    config = {**s.case.config, "init_lora_weights": True, "r": 7 * groups}
    if "trainable_token_indices" in config:
        config["trainable_token_indices"] = {"embed": [0, 1, 2, 4, 6]}
    program = adaptc.compile(s.base, adaptc.LoraConfig(**config), example_inputs=s.case.args(3), backend="inductor")
    assert_close(program(*args), s.base(*args), 1e-9)
    smallest = {**s.case.config, "r": groups}
    if "trainable_token_indices" in config:
        smallest["trainable_token_indices"] = {"embed": [3]}
    one = adaptc.compile(s.base, adaptc.LoraConfig(**smallest), example_inputs=s.case.args(3))
    with torch.no_grad():
        for p in adapter_parameters(one).values():
            if p.is_floating_point():
                p.copy_(torch.rand_like(p))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, s.directory)
        assert_close(program(*args), s.program(*args), 1e-9)
        adaptc.swap(program, adapter_parameters(one), config=adaptc.LoraConfig(**smallest))
        assert_close(program(*args), one(*args), 1e-9)
    assert_valid(program)


def test_every_name_is_a_case():
    assert set(NAMES) <= set(CASES)
