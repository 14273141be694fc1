"""RoAd: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.support.custom_models import OneLayer

X = torch.linspace(-2, 3, 15).reshape(3, 5)


def net(outputs: int = 12) -> nn.Module:
    torch.manual_seed(3)
    return OneLayer(nn.Linear(5, outputs)).eval()


def compile(adapter: Any, outputs: int = 12) -> adaptc.AdaptedProgram:
    return adaptc.compile(net(outputs), adapter, example_inputs=X)


def by_peft(path: Path, seed: int = 1, **options: Any) -> Tensor:
    """Outputs of a random adapter of PEFT's, saved to ``path``."""
    model = peft.get_peft_model(net(), peft.RoadConfig(target_modules=["layer"], **options)).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "road_" in name:
            nn.init.normal_(p)
    model.save_pretrained(str(path))
    return model(X)


def test_a_quarter_turn_takes_each_row_to_its_partner():
    program = compile(adaptc.RoadConfig(target_modules=["layer"], group_size=4))
    adaptc.swap(program, {"layer.road_theta": torch.full((6,), math.pi / 2), "layer.road_alpha": torch.full((6,), 2.0)})
    merged, base = adaptc.merge(program).state_dict, net().state_dict()
    for name in ("layer.weight", "layer.bias"):
        rows = base[name]
        expected = torch.cat([2 * torch.cat([-g[2:], g[:2]]) for g in rows.split(4)])
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_first_values_are_those_of_peft(variant):
    options = {"target_modules": ["layer"], "variant": variant, "group_size": 6, "init_weights": False}
    first, second = net(), net()
    torch.manual_seed(4)
    values = peft.get_peft_model(first, peft.RoadConfig(**options)).state_dict()
    torch.manual_seed(4)
    program = adaptc.compile(second, adaptc.RoadConfig(**options), example_inputs=X)
    for a in program.adaptation.attachments:
        for name, fqn in a.slots.items():
            assert torch.equal(program.binding.values[fqn], values[f"base_model.model.layer.{name}.default"])


def test_adapters_in_other_groups_and_variants_share_a_program(tmp_path):
    kinds = {
        "a": {"group_size": 4},
        "b": {"group_size": 6},
        "c": {"variant": "road_4", "group_size": 4},
    }
    expected = {n: by_peft(tmp_path / n, seed=i, **k) for i, (n, k) in enumerate(kinds.items())}
    program = compile([tmp_path / n for n in kinds])
    assert len(program.adaptation.attachments) == 3
    for name in ("c", "a", "b"):
        adaptc.swap(program, tmp_path / name)
        torch.testing.assert_close(program(X), expected[name])
        torch.testing.assert_close(adaptc.merge(program)(X), expected[name])


def test_unmerge_survives_scales_of_zero():
    """PEFT inverts the turn, and there is no inverse."""
    program = compile(adaptc.RoadConfig(target_modules=["layer"], group_size=2))
    adaptc.swap(program, {"layer.road_theta": torch.zeros(6), "layer.road_alpha": torch.zeros(6)})
    merged = adaptc.merge(program)
    assert not merged(X).any()
    unloaded = adaptc.unload(adaptc.unmerge(merged))
    assert all(torch.equal(v, net().state_dict()[k]) for k, v in unloaded.state_dict.items())


def test_refusals():
    with pytest.raises(adaptc.ConfigError, match="variant must be one of road_1, road_2, road_4, got 'road_3'"):
        adaptc.RoadConfig(variant="road_3")
    for size in (True, 2.0):
        with pytest.raises(adaptc.ConfigError, match="group_size must be an integer"):
            adaptc.RoadConfig(group_size=size)
    for size in (0, 7, -2):
        with pytest.raises(adaptc.ConfigError, match="positive even number"):
            adaptc.RoadConfig(group_size=size)
    with pytest.raises(adaptc.TargetError, match=r"'layer.weight'.*group_size=8, and there are 12; group_size=12 fits"):
        compile(adaptc.RoadConfig(target_modules=["layer"], group_size=8))
    with pytest.raises(adaptc.TargetError, match="there are 13; an odd number cannot be paired"):
        compile(adaptc.RoadConfig(target_modules=["layer"]), outputs=13)
