"""Modules that are called by words of Python, of which torch makes no module again: they are captured all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptc


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("in", nn.ModuleDict({"from": nn.Linear(5, 7)}))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.get_submodule("in.from")(x))


def test_modules_called_by_words_of_python() -> None:
    net, x = Net().eval(), torch.randn(3, 5)
    config = adaptc.LoraConfig(r=2, target_modules=["in.from"], init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=x)
    torch.testing.assert_close(program.base(x[:1]), net(x[:1]))
    torch.testing.assert_close(adaptc.merge(program)(x), program(x))


class Branching(Net):
    """Computes something else for one row."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(7, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        y = self.get_submodule(self.name)(super().forward(x)) * scale
        return {"y": y * 3 if x.shape[0] == 1 else y, "x": x}


@pytest.mark.parametrize("name", ["lambda", "class", "plain"])
def test_what_is_done_for_one_row_is_checked_there_too(name: str) -> None:
    """By its values: such a branch leaves no guard."""
    net, inputs = Branching(name).eval(), {"x": torch.randn(3, 5), "scale": torch.tensor(2.0)}
    config = adaptc.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    with pytest.warns(adaptc.AdaptcWarning, match="something else for size 1 of axis 0 of input 'x'"):
        program = adaptc.compile(net, config, example_inputs=inputs)
    assert net.calls == 0
    torch.testing.assert_close(program.base(**inputs), net(**inputs))


def test_one_row_that_is_no_branch_stays_free() -> None:
    """The example of one row is captured for any number of them."""
    net, x = Net().eval(), torch.randn(1, 5)
    program = adaptc.compile(net, adaptc.LoraConfig(r=2, target_modules=["in.from"]), example_inputs=x)
    many = torch.randn(4, 5)
    torch.testing.assert_close(program(many), net(many))
