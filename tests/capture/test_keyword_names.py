"""Modules that are called by words of Python, of which torch makes no module again: they are captured all the same."""

from __future__ import annotations

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
