"""BEFT: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import BeftConfig, ConfigError, TargetError
from tests.support.chain import as_stored, compile_chain, inputs, peft_chain, peft_config, tensor_files_are_equal
from tests.support.subject import quiet

X = torch.linspace(-2, 3, 15, dtype=torch.float64).reshape(3, 5)


class Pair(nn.Module):
    """A layer without a bias, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.layer = nn.Linear(5, 7, bias=False), nn.Linear(7, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.bare(x)))


def pair() -> Pair:
    torch.manual_seed(3)
    return Pair().double().eval()


def by_peft(path: Path, seed: int = 1) -> Any:
    """PEFT's model of the pair with random vectors, saved to ``path``."""
    with quiet():
        model = peft.get_peft_model(pair(), peft.BeftConfig(target_modules=["bare", "layer"])).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "beft_" in name:
            nn.init.normal_(p)
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("form", ["apply", "weight"])
def test_a_layer_without_a_bias_gets_one(form, tmp_path):
    """PEFT adapts such a layer, and refuses to merge it."""
    model = by_peft(tmp_path)
    with pytest.raises(ValueError, match="has no bias"):
        copy.deepcopy(model).merge_and_unload()
    program = adaptc.compile(pair(), tmp_path, example_inputs=X, form=form)
    torch.testing.assert_close(program(X), model(X))
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(X), model(X))
    added = model.base_model.model.bare.beft_bias["default"].detach().reshape(-1)
    assert torch.equal(merged.state_dict["bare.bias"], added)
    assert torch.equal(merged.state_dict["bare.weight"], pair().bare.weight)
    unmerged = adaptc.unmerge(merged)
    assert torch.equal(unmerged(X), program(X))
    assert set(adaptc.unload(unmerged).state_dict) == set(pair().state_dict())


@pytest.mark.long
def test_adapters_that_act_together_are_added(tmp_path):
    alone = [by_peft(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    sums = [
        sum(m.get_submodule(f"base_model.model.{n}").beft_bias["default"].reshape(-1) for m in alone)
        for n in ("bare", "layer")
    ]
    base = pair()
    expected = base.layer(torch.tanh(base.bare(X) + sums[0])) + sums[1]
    program = adaptc.compile(pair(), {n: tmp_path / n for n in "ab"}, example_inputs=X)
    torch.testing.assert_close(program(X), expected)
    torch.testing.assert_close(adaptc.merge(program)(X), expected)
    one = adaptc.load_adapter(tmp_path / "a") + adaptc.load_adapter(tmp_path / "b")
    torch.testing.assert_close(adaptc.compile(pair(), one, example_inputs=X)(X), expected)


@pytest.mark.parametrize("scheme", [True, False])
def test_first_values_are_peft_s(tmp_path, scheme):
    """PEFT draws where zeros follow, so both leave the generator in the same state."""
    options = {"target_modules": ["q", "v"], "init_weights": scheme}
    peft_chain(peft_config("BeftConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    after = torch.rand(3)
    generator = torch.Generator().manual_seed(1)
    program = compile_chain(BeftConfig(**options), torch.float32, generator=generator)
    assert torch.equal(torch.rand(3, generator=generator), after)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_only_vectors_are_trained():
    module = compile_chain(BeftConfig(target_modules=["q", "v"]), training=True).module()
    module(inputs(3)).square().sum().backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert {n.partition(".")[0]: tuple(p.shape) for n, p in trained.items()} == {"q": (1, 20), "v": (1, 16)}
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())


def test_weights_without_a_bias_are_refused():
    model = nn.Sequential(nn.Embedding(5, 7), nn.Linear(7, 3))
    with pytest.raises(TargetError, match="BEFT adapts the bias of a layer, and a consumer of kind 'embedding' takes"):
        adaptc.compile(model, BeftConfig(target_modules=["0"]), example_inputs=torch.arange(3))
    with pytest.raises(ConfigError, match=r"target_parameters.*name the layer in target_modules"):
        BeftConfig(target_parameters=["0.weight"])
    with pytest.raises(ConfigError, match="init_weights must be"):
        BeftConfig(init_weights="yes")  # type: ignore[arg-type]


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(BeftConfig(target_modules=["q"])) == as_stored(peft_config("BeftConfig", target_modules=["q"]))
