"""QA-LoRA next to PEFT's: outputs, gradients, first values, dropout, files both ways; and what is refused.

PEFT makes its layer around those of GPTQ, whose package is not needed: that layer is the same around a plain one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, SwapError, TargetError
from adaptc.methods.lora_family.qalora import QaLora
from adaptc.passes.graph.ops import Op
from tests.support.subject import FILE, loss, quiet

OPTIONS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "target_modules": ["up", "down"],
    "use_qalora": True,
    "qalora_group_size": 5,
}


class Net(nn.Module):
    """Fifteen features in groups of five, then thirty-five."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(15, 35), nn.Linear(35, 11, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(*shape, 15, dtype=torch.float64)


def peft_config(**options: Any) -> peft.LoraConfig:
    config = peft.LoraConfig(**{**OPTIONS, **options})
    config._register_custom_module({nn.Linear: GPTQLoraLinear})
    return config


def peft_model(
    path: Path | None = None, seed: int | None = 5, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """PEFT's model, with random tensors where there is a seed, saved to ``path``."""
    model = peft.get_peft_model(Net(dtype), peft_config(**options))
    assert sum(isinstance(m, GPTQLoraLinear) for m in model.modules()) == 2
    if seed is not None:
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, dtype=dtype) * 0.5
    if path is not None:
        with quiet():
            model.save_pretrained(str(path))
    return model.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_gradients_and_files(rslora, tmp_path):
    model = peft_model(tmp_path / "peft", use_rslora=rslora)
    program = adaptc.compile(Net(), tmp_path / "peft", example_inputs=inputs(3, 4), training=True)
    for shape in ((3, 4), (7, 2), (2, 6)):
        close(program(inputs(*shape)), model(inputs(*shape)))
    assert not torch.allclose(program(inputs(3, 4)), Net()(inputs(3, 4)), atol=1e-2)
    module = program.module()
    loss(model(inputs(5, 2))).backward()
    loss(module(inputs(5, 2))).backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, grad in expected.items():
        close(found[name], grad)
    adaptc.save_adapter(program, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / d / FILE) for d in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], t) for k, t in theirs.items())
    assert theirs["base_model.model.down.lora_A.weight"].shape == (3, 7)
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
    assert [c["use_qalora"] for c in configs] == [True, True]
    assert [c["qalora_group_size"] for c in configs] == [5, 5]
    with quiet():
        again = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours"), config=peft_config(use_rslora=rslora))
    close(again(inputs(3, 4)), model(inputs(3, 4)))


@given(st.data())
def test_the_weight_is_what_the_layer_computes(data):
    """Of PEFT's own forward, for sizes of all kinds; and a merge is that weight."""
    groups, size, rank = (data.draw(st.integers(1, 7)) for _ in range(3))
    outputs, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    layer = nn.Linear(groups * size, outputs).double()
    options = {"use_qalora": True, "qalora_group_size": size, "r": rank, "lora_alpha": data.draw(st.integers(1, 9))}
    with quiet():  # of layers that have no features
        theirs = GPTQLoraLinear(
            layer, "a", peft.LoraConfig(**options), r=rank, lora_alpha=options["lora_alpha"]
        ).double()
    nn.init.normal_(theirs.lora_B["a"].weight)
    op = Op("linear", tuple(layer.weight.shape), torch.ops.aten.linear.default, ())
    method = LoraConfig(**options).method("layer", "linear")
    assert isinstance(method, QaLora)
    slots = {"lora_A.weight": theirs.lora_A["a"].weight, "lora_B.weight": theirs.lora_B["a"].weight}
    assert {n: s.shape for n, s in method.slots(op).items()} == {n: tuple(t.shape) for n, t in slots.items()}
    x = torch.randn(5, groups * size, dtype=torch.float64)
    full = method.weight(op, layer.weight, slots, method.scale(op))
    torch.testing.assert_close(op(x, full, layer.bias), theirs(x), rtol=1e-9, atol=1e-9)
    change = (full - layer.weight).reshape(outputs, groups, size)
    torch.testing.assert_close(change, change[..., :1].expand_as(change), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(init):
    config = LoraConfig(target_modules=["up"])
    base = adaptc.unload(adaptc.compile(Net(torch.float32), config, example_inputs=inputs(3, 4).float()))
    net = Net(torch.float32)
    torch.manual_seed(1)
    model = peft.get_peft_model(net, peft_config(init_lora_weights=init))
    generator = torch.Generator().manual_seed(1)
    program = adaptc.compile(base, LoraConfig(**OPTIONS, init_lora_weights=init), generator=generator)
    found = {n: t for n, t in program.binding.values.items() if "lora_" in n and t.ndim}
    assert len(found) == 4
    for name, value in found.items():
        assert torch.equal(value, model.get_parameter(f"base_model.model.{name}")), name


def test_gaussian_first_values_have_their_width():
    """PEFT draws them for LoRA's A, and then puts an A in its place that is not normal."""
    op = Op("linear", (40, 3000), torch.ops.aten.linear.default, ())
    method = QaLora(r=20, group_size=3, scheme="gaussian")
    slots = method.init(op, torch.zeros(40, 3000), torch.float32, torch.Generator().manual_seed(0)).slots
    assert float(slots["lora_A.weight"].std()) == pytest.approx(1 / 20, rel=0.02)
    assert not slots["lora_B.weight"].any()


def test_dropout_acts_before_the_pooling(tmp_path):
    model = peft_model(tmp_path, lora_dropout=0.5).train()
    module = adaptc.compile(Net(), tmp_path, example_inputs=inputs(3, 4), training=True).module()
    x = inputs(3, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    close(module(x), expected)
    assert not torch.allclose(module(x), expected)


def test_swaps_and_what_they_refuse(tmp_path):
    """Another rank and scale are a swap; another size of the groups is other code."""
    model = peft_model(tmp_path / "a", r=6, lora_alpha=2)
    peft_model(tmp_path / "b", qalora_group_size=1)
    program = adaptc.compile(Net(), LoraConfig(**OPTIONS), example_inputs=inputs(3, 4))
    adaptc.swap(program, tmp_path / "a")
    close(program(inputs(2, 3)), model(inputs(2, 3)))
    with pytest.raises(SwapError, match="group_size"):
        adaptc.swap(program, tmp_path / "b")
    close(program(inputs(2, 3)), model(inputs(2, 3)))


def test_combined_adapters_are_plain_lora(tmp_path):
    a, b = (peft_model(tmp_path / n, seed, qalora_group_size=g) for n, seed, g in (("a", 5, 5), ("b", 6, 5)))
    made = adaptc.combine({str(tmp_path / "a"): 0.5, str(tmp_path / "b"): -2.0}, method="cat")
    assert not made.config.use_qalora
    found = adaptc.merge(adaptc.compile(Net(), made, example_inputs=inputs(3, 4))).state_dict["down.weight"]
    base = Net().down.weight
    op, method = (
        Op("linear", (11, 35), torch.ops.aten.linear.default, ()),
        LoraConfig(**OPTIONS).method("down", "linear"),
    )
    expected = base.detach().clone()
    for model, weight in ((a, 0.5), (b, -2.0)):
        layer = model.base_model.model.down
        slots = {"lora_A.weight": layer.lora_A["default"].weight, "lora_B.weight": layer.lora_B["default"].weight}
        expected += weight * (method.weight(op, base, slots, method.scale(op)) - base).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    def compiled(**options: Any) -> Any:
        return adaptc.compile(Net(), LoraConfig(**{**OPTIONS, **options}), example_inputs=inputs(3, 4))

    with pytest.raises(TargetError, match=r"qalora_group_size=7, and the layer has 15 .*qalora_group_size=5 fits"):
        compiled(qalora_group_size=7)
    for options, said in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*QA-LoRA"),
        ({"qalora_group_size": 0}, "qalora_group_size must be a positive integer"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
        ({"use_dora": True}, "use_dora and use_qalora .*do not combine"),
    ):
        with pytest.raises(ConfigError, match=said):
            compiled(**options)
    conv = nn.Sequential(nn.Conv1d(15, 5, 3))
    with pytest.raises(TargetError, match="pools the input features of a matrix"):
        adaptc.compile(conv, LoraConfig(**{**OPTIONS, "target_modules": ["0"]}), example_inputs=torch.randn(2, 15, 9))
