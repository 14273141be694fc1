"""``all-linear`` means the classes that PEFT's isinstance means; what it leaves out, and parameters, are named."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import LoraConfig
from adaptc.errors import TargetError


class Dense(nn.Linear):
    """A linear layer by another name."""


class Twice(Dense):
    """One that derives from that."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Columns(Conv1D):
    pass


class Router(nn.Module):
    """Multiplies as a linear layer does, and is none to PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 11))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.dense, self.twice = nn.Linear(7, 5), Dense(5, 13), Twice(13, 6)
        self.columns, self.router = Columns(11, 6), Router()
        self.wq = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.router(self.columns(self.twice(torch.tanh(self.dense(self.plain(x))))))
        return y @ self.wq


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_all_linear_finds_what_peft_s_isinstance_does(tmp_path: Any) -> None:
    torch.manual_seed(1)
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    oracle = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    oracle.save_pretrained(str(tmp_path))
    x = torch.randn(4, 7)
    program: Any = adaptc.compile(model, LoraConfig(r=2, target_modules="all-linear"), example_inputs=x)
    wanted = {n.removeprefix("base_model.model.") for n, m in oracle.named_modules() if hasattr(m, "lora_A")}
    assert {a.module for a in program.adaptation.attachments} == wanted
    assert wanted == {"plain", "dense", "twice", "columns"}
    adaptc.swap(program, tmp_path)
    torch.testing.assert_close(program(x), oracle(x), rtol=1e-5, atol=1e-5)
    why = dict(program.adaptation.left_out)["router"]
    assert why.startswith("a matmul, but its class (Router) is no linear layer")


def test_programs_know_it_too(tmp_path: Any) -> None:
    """One that gets another adapter, and one from a file."""
    config = LoraConfig(r=2, target_modules="all-linear")
    program: Any = adaptc.compile(Net(), {"one": config}, example_inputs=torch.randn(4, 7))
    adaptc.save(program, tmp_path / "net.pt2")
    for known in (program, adaptc.load(tmp_path / "net.pt2")):
        added = known.add_adapter("two", config, recompile=True)
        sites = {a.module for a in added.adaptation.attachments if a.adapter == "two"}
        assert sites == {"plain", "dense", "twice", "columns"}


@pytest.mark.parametrize(("target", "way"), [(["wq"], r"\['wq'\]"), ("w[q]", r"\['wq'\]")])
def test_a_parameter_that_is_named_as_a_module_is_told(target: Any, way: str) -> None:
    with pytest.raises(TargetError, match=rf"the parameter 'wq': name it in target_parameters={way}"):
        adaptc.compile(Net(), LoraConfig(r=2, target_modules=target), example_inputs=torch.randn(4, 7))


def test_the_report_lists_parameters_that_nothing_adapts() -> None:
    config = LoraConfig(r=2, target_modules=["plain", "dense"])
    report = adaptc.report(adaptc.compile(Net(), config, example_inputs=torch.randn(4, 7)))
    found = {entry["parameter"]: entry["shape"] for entry in report.to_dict()["unadapted"]}
    assert found["wq"] == [3, 4]
    assert found["plain.bias"] == [5]
    assert not {"plain.weight", "dense.weight"} & set(found)
    assert not any("lora" in name for name in found)
    text = str(report)
    assert "unadapted parameter" in text
    assert any("wq" in line and "3 x 4" in line and "12" in line for line in text.splitlines())
