"""Modules may be called anything that is no path: what a model's modules are adapted by, its program is adapted by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support.cover import examples

#: what module names may hold that means something elsewhere: marks of calls, roots, places of lists, patterns
PARTS = ["@", "@1", "@2", "a", "0", "-", "_", " ", "L['self']", "*", "$", "self", "é", "x@y", "weight", "(", "lora_A"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("".join)


class Chain(nn.Module):
    """Linear layers under odd names, below a module with an odd name; the first of them is called twice."""

    def __init__(self, outer: str, names: list[str]) -> None:
        super().__init__()
        inner = nn.Module()
        for name in names:
            inner.add_module(name, nn.Linear(5, 5))
        self.add_module(outer, inner)
        self.path = [outer, *names]

    def forward(self, x: Tensor) -> Tensor:
        outer, first, *rest = self.path
        inner = self._modules[outer]
        assert inner is not None
        for name in (first, first, *rest):
            x = torch.tanh(inner._modules[name](x))
        return x


@pytest.mark.long
@example("a@1", ["b@2", "b"])
@example("L['self']", ["x@y", "0"])
@settings(max_examples=examples(12))
@given(NAMES, st.lists(NAMES, min_size=1, max_size=3, unique=True))
def test_program_and_module_have_the_same_sites(outer: str, names: list[str]) -> None:
    net, x = Chain(outer, names).eval(), torch.randn(3, 5)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    by_module = adaptc.compile(net, config, example_inputs=x)
    torch.manual_seed(0)
    by_program = adaptc.compile(torch.export.export(net, (x,)), config)
    found = [[(a.module, a.kind, len(a.consumers)) for a in p.adaptation.attachments] for p in (by_module, by_program)]
    expected = [(f"{outer}.{name}", "linear", 1 if i else 2) for i, name in enumerate(names)]
    assert sorted(found[0]) == sorted(found[1]) == sorted(expected)
    torch.testing.assert_close(by_program(x), by_module(x))
    assert not torch.allclose(by_module(x), net(x))
