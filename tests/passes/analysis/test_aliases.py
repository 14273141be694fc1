"""Modules held under several names: one adapter for all calls, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig, TargetError
from adaptc.capture.capture import capture
from adaptc.passes.analysis.sites import find_sites


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"lin": nn.Linear(7, 7, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner["lin"](x))


class Aliased(nn.Module):
    """One block as ``block``, ``alias`` and twice in a list; a layer of its own, held under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.alias = self.block
        self.layers = nn.ModuleList([self.block, Block(), self.block])
        self.lin = nn.Linear(7, 5)
        self.again = self.lin

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.alias, *self.layers, self.block]:
            x = x + layer(x)
        return self.lin(x)


X = torch.randn(3, 7)


def test_one_site_for_all_calls() -> None:
    sites = {s.fqn: s for s in find_sites(capture(Aliased(), X).program)}
    assert set(sites) == {"block.inner.lin.weight", "layers.1.inner.lin.weight", "lin.weight", "lin.bias"}
    assert len(sites["block.inner.lin.weight"].consumers) == 4
    assert len(sites["layers.1.inner.lin.weight"].consumers) == 1
    assert not any(s.tied for s in sites.values())


@pytest.mark.parametrize("targets", [["lin"], ["block.inner.lin"], ["layers.1.inner.lin"], "all-linear"], ids=str)
def test_adapters_are_pefts(targets: list[str] | str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Aliased()
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    expected = peft.get_peft_model(copy.deepcopy(model), config)
    expected.save_pretrained(str(tmp_path))
    program = adaptc.compile(model, tmp_path, example_inputs=X)
    torch.testing.assert_close(program(X), expected(X))
    torch.testing.assert_close(adaptc.merge(program)(X), expected(X))
    assert not torch.allclose(program(X), model(X), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adaptc.unload(program)(X), model(X))


def test_further_names_are_no_targets() -> None:
    """PEFT does not know them either."""
    for target in ("alias.inner.lin", "layers.0.inner.lin", "again"):
        with pytest.raises(TargetError, match=target):
            adaptc.compile(Aliased(), LoraConfig(target_modules=[target]), example_inputs=X)
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.get_peft_model(Aliased(), peft.LoraConfig(target_modules=[target]))
