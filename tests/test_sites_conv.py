"""Convolutions: PEFT is the oracle where it keeps all options of the layer, a merge by hand where it drops one."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.custom_models import CONV, CONV_BY_HAND
from tests.site_checks import close, every_check, subject


@every_check(CONV)
def test_site(name, check, tmp_path):
    check(subject(name), tmp_path)


@every_check(CONV_BY_HAND)
def test_site_by_hand(name, check, tmp_path):
    check(subject(name), tmp_path)


@pytest.mark.parametrize("name", [c.name for c in CONV if not c.merges])
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
    close(merged.state_dict["layer.weight"].detach(), dense.detach())
