"""A linear class that multiplies by its transposed weight itself: a site of kind 'weight', and still a linear layer."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig


class ProductLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ProductLinear(7, 11)
        self.second = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_all_linear_adapts_it_like_peft(tmp_path):
    torch.manual_seed(2)
    model = Net()
    twin = Net()
    twin.load_state_dict(model.state_dict())
    config = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    peft_model = get_peft_model(twin, PeftLoraConfig(**config, init_lora_weights=False))
    peft_model.save_pretrained(str(tmp_path))
    program = adaptc.compile(model, LoraConfig(**config), example_inputs=torch.randn(2, 7))
    assert {a.kind for a in program.adaptation.attachments} == {"weight", "linear"}
    adaptc.swap(program, tmp_path)
    x = torch.randn(5, 7)
    torch.testing.assert_close(program(x), peft_model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adaptc.merge(program)(x), peft_model(x), rtol=1e-5, atol=1e-6)
