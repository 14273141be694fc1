"""Convolutions: PEFT is the oracle where it keeps all options of the layer, a merge by hand where it drops one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from tests.support.cover import examples
from tests.support.custom_models import OneLayer
from tests.support.site_cases import CONV, CONV_BY_HAND
from tests.support.site_checks import assert_close, changed_by, parametrize_checks, subject


@pytest.mark.few(12)
@parametrize_checks(CONV)
def test_site(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


@pytest.mark.few(12)
@parametrize_checks(CONV_BY_HAND)
def test_site_by_hand(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


@pytest.mark.parametrize("name", [c.name for c in CONV if not c.peft_merge])
def test_a_grouped_convolution_is_merged_into_a_dense_one(name):
    """A reads every channel, so the change does not fit the groups; PEFT cannot merge these."""
    s = subject(name)
    layer, groups, r = s.base.layer, s.base.layer.groups, s.case.config["r"]
    A, B = (s.file[f"base_model.model.layer.lora_{x}.weight"].flatten(1) for x in "AB")
    out, rank = layer.out_channels // groups, r // groups
    change = torch.cat([B[g * out : (g + 1) * out] @ A[g * rank : (g + 1) * rank] for g in range(groups)])
    dense = (change * s.case.config["lora_alpha"] / r).reshape(
        layer.out_channels, layer.in_channels, *layer.kernel_size
    )
    width = layer.in_channels // groups
    for g in range(groups):
        dense[g * out : (g + 1) * out, g * width : (g + 1) * width] += layer.weight[g * out : (g + 1) * out]
    merged = adaptc.merge(s.program)
    assert_close(merged.state_dict["layer.weight"].detach(), dense.detach())
    again = adaptc.compile(merged, adaptc.LoraConfig(r=7, target_modules=["layer"]))
    x = s.case.args(4)
    assert_close(again(*x), s.program(*x))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    r=st.integers(1, 3),
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    padding=st.one_of(st.just("same"), st.just("valid"), st.tuples(*[st.integers(0, 2)] * 3)),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
    bias=st.booleans(),
)
@settings(max_examples=examples(25))
def test_any_convolution_is_its_merged_weight(axes, groups, channels, r, kernel, stride, dilation, padding, mode, bias):
    options = {"kernel_size": kernel[:axes], "dilation": dilation[:axes], "padding_mode": mode, "bias": bias}
    options["padding"] = padding if isinstance(padding, str) else padding[:axes]
    options["stride"] = 1 if padding == "same" else stride[:axes]
    inner, outer = (c * groups for c in channels)
    layer = getattr(nn, f"Conv{axes}d")(inner, outer, groups=groups, **options)
    model = OneLayer(layer).double().eval()
    x = torch.randn(2, inner, *(7, 9, 6)[:axes], dtype=torch.float64)
    config = adaptc.LoraConfig(r=r * groups, lora_alpha=5, target_modules=["layer"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x, dynamic_shapes=None)
    found = program(x)
    assert not torch.allclose(found, model(x), rtol=1e-6)
    assert_close(adaptc.merge(program)(x), found)
