"""Layers that multiply by a transposed weight themselves, as Falcon's do: linear layers, for every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

import adaptc
from adaptc import IA3Config, LilyConfig, LoraConfig, PolyConfig
from adaptc.capture.capture import capture
from tests.support.families import FAMILIES


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
    assert {a.kind for a in program.adaptation.attachments} == {"linear"}
    adaptc.swap(program, tmp_path)
    x = torch.randn(5, 7)
    torch.testing.assert_close(program(x), peft_model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adaptc.merge(program)(x), peft_model(x), rtol=1e-5, atol=1e-6)


TRANSPOSES: dict[str, Callable[[Tensor], Tensor]] = {
    "T": lambda w: w.T,
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-1, -2),
    "permute": lambda w: w.permute(1, 0),
}


class Transposed(nn.Module):
    """A product in one of the ways that people write it."""

    def __init__(self, how: str, bias: bool) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(11, 7))
        self.bias = nn.Parameter(torch.randn(11)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ TRANSPOSES[self.how](self.weight)
        return y if self.bias is None else y + self.bias


def targets(program) -> list[str]:
    return [str(n.target) for n in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", TRANSPOSES)
def test_a_product_is_a_linear_layer(how: str, bias: bool) -> None:
    """To the bit without a bias; with one, it is taken in, and one rounding less is done."""
    model = Transposed(how, bias)
    program = capture(model, torch.randn(2, 3, 7)).program
    assert len(targets(program)) == 1
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    for shape in [(2, 3, 7), (1, 1, 7), (5, 4, 7)]:
        x = torch.randn(*shape)
        found, expected = program.module()(x), model(x)
        if bias:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found, expected)


class Tied(nn.Module):
    """A table that is looked up and multiplied by; a bias that something else reads; a vector as input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(11, 7), Transposed("T", bias=True)
        self.w = nn.Parameter(torch.randn(5, 11))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.other(x) + self.other.bias
        return y + x @ self.table.weight.T + (self.w @ self.table.weight).sum()


def test_what_else_reads_the_weight_stays_as_it_is() -> None:
    model, ids = Tied(), torch.randint(11, (2, 3))
    program = capture(model, ids).program
    assert len(targets(program)) == 1  # the other one's, whose bias stays outside
    torch.testing.assert_close(program.module()(ids), model(ids), rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("config", [PolyConfig(r=2, n_tasks=2, n_skills=2), LilyConfig(r=2), IA3Config()])
def test_methods_with_a_form_for_linear_layers_alone_take_falcon(config) -> None:
    names = {"target_modules": ["query_key_value"]} | ({"feedforward_modules": []} if config.peft_type == "IA3" else {})
    program = adaptc.compile(FAMILIES["falcon"].build(), config.replace(**names))
    assert {a.kind for a in program.adaptation.attachments} == {"linear"}


def test_ia3_scales_the_bias_as_peft_does(tmp_path) -> None:
    import peft

    torch.manual_seed(2)
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    config = {"target_modules": ["first"], "feedforward_modules": []}
    peft_model = get_peft_model(twin, peft.IA3Config(**config, init_ia3_weights=False))
    for name, p in peft_model.named_parameters():
        if "ia3" in name:
            p.data.uniform_(0.5, 2)
    peft_model.save_pretrained(str(tmp_path))
    program, x = adaptc.compile(model, tmp_path, example_inputs=torch.randn(2, 7)), torch.randn(5, 7)
    torch.testing.assert_close(program(x), peft_model(x), rtol=1e-5, atol=1e-6)
