"""State dicts of Microsoft's loralib: each layer as loralib itself computes it."""

from __future__ import annotations

from pathlib import Path

import loralib
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import AdaLoraConfig, AdaptcError, CheckpointError, ConfigError, LoraConfig
from adaptc.adapter_files.formats.detect import detect_format
from tests.test_cli import call

RANK, ALPHA = 3, 5
CONFIG = LoraConfig(r=RANK, lora_alpha=ALPHA)
SAID = {"r": RANK, "lora_alpha": ALPHA}


class Layer(nn.Module):
    """One layer, called ``inner.layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["layer"](x)


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 8)


#: name -> (loralib's layer, the plain one, an input)
LAYERS = {
    "linear": (
        lambda: loralib.Linear(7, 11, **SAID),
        lambda: nn.Linear(7, 11),
        lambda: torch.randn(2, 7),
    ),
    "linear, transposed": (
        lambda: loralib.Linear(7, 11, fan_in_fan_out=True, **SAID),
        lambda: Conv1D(11, 7),
        lambda: torch.randn(2, 7),
    ),
    "embedding": (
        lambda: loralib.Embedding(13, 7, **SAID),
        lambda: nn.Embedding(13, 7),
        lambda: torch.randint(0, 13, (2, 5)),
    ),
    "square embedding": (
        lambda: loralib.Embedding(7, 7, **SAID),
        lambda: nn.Embedding(7, 7),
        lambda: torch.randint(0, 7, (2, 5)),
    ),
    "merged": (
        lambda: loralib.MergedLinear(7, 33, enable_lora=[True] * 3, **SAID),
        lambda: nn.Linear(7, 33),
        lambda: torch.randn(2, 7),
    ),
    "merged, transposed": (
        lambda: loralib.MergedLinear(7, 22, enable_lora=[True] * 2, fan_in_fan_out=True, **SAID),
        lambda: Conv1D(22, 7),
        lambda: torch.randn(2, 7),
    ),
    "convolution": (lambda: loralib.Conv2d(5, 7, 3, **SAID), lambda: nn.Conv2d(5, 7, 3), lambda: image(5)),
    "kernel of one": (lambda: loralib.Conv2d(5, 7, 1, **SAID), lambda: nn.Conv2d(5, 7, 1), lambda: image(5)),
    "oblong": (None, lambda: nn.Conv2d(5, 7, (3, 2)), lambda: image(5)),
    "groups": (
        lambda: loralib.Conv2d(10, 6, 3, groups=2, **SAID),
        lambda: nn.Conv2d(10, 6, 3, groups=2),
        lambda: image(10),
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model with loralib's layer, in eval mode, the plain one with the same base, and an input."""
    torch.manual_seed(0)
    theirs, plain, x = (make() for make in LAYERS[name])
    lora, model = Layer(theirs), Layer(plain)
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.5)
        base = {k.replace("layer.conv.", "layer."): t for k, t in lora.state_dict().items() if "lora_" not in k}
        model.load_state_dict({k: t.contiguous() for k, t in base.items()})
    return lora, model, x


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "oblong"])
@torch.no_grad()
def test_each_layer_is_loralibs(name: str, tmp_path: Path) -> None:
    lora, model, x = pair(name)
    torch.save(loralib.lora_state_dict(lora), tmp_path / "lora.pt")
    wanted = lora.train()(x)  # in train mode loralib computes the adapter beside the layer
    for source in (tmp_path / "lora.pt", loralib.lora_state_dict(lora)):
        program = adaptc.compile(model, source, config=CONFIG, example_inputs=x)
        torch.testing.assert_close(program(x), wanted, rtol=1e-4, atol=1e-5)
    assert program.binding.origin.format == "loralib"
    assert (wanted - model(x)).abs().max() > 1e-2, "the adapter does nothing"
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(x), lora.eval()(x), rtol=1e-4, atol=1e-5)
    adaptc.unmerge(merged)
    adaptc.save_adapter(program, tmp_path / "peft")
    again = adaptc.compile(model, tmp_path / "peft", example_inputs=x)
    assert torch.equal(again(x), program(x))


class Two(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@torch.no_grad()
def test_biases_are_those_of_the_file(bias: str) -> None:
    torch.manual_seed(0)
    lora, model, x = Two(loralib.Linear(7, 11, **SAID)), Two(nn.Linear(7, 11)), torch.randn(2, 7)
    model.load_state_dict({k: t for k, t in lora.state_dict().items() if "lora_" not in k})
    for key, p in lora.named_parameters():
        if "lora_" in key or (key.endswith("bias") and (bias == "all" or key.startswith("first"))):
            p.normal_()
    tensors = loralib.lora_state_dict(lora, bias=bias)
    program = adaptc.compile(model, tensors, config=CONFIG, example_inputs=x)
    torch.testing.assert_close(program(x), lora(x), rtol=1e-5, atol=1e-5)
    assert program.binding.config.bias == bias
    torch.testing.assert_close(adaptc.unload(program)(x), model(x))


@pytest.mark.parametrize("is_wrapped", [True, False])
@torch.no_grad()
def test_a_convolution_is_found_with_and_without_loralibs_wrapper(is_wrapped: bool) -> None:
    """Its weight and bias are ``layer.conv.weight`` and ``layer.conv.bias`` in loralib's model."""
    lora, plain, x = pair("convolution")
    lora.inner["layer"].conv.bias.normal_()
    tensors = {k: t for k, t in lora.state_dict().items() if "lora_" in k or k.endswith("bias")}
    wrapped = Layer(nn.Sequential())
    wrapped.inner["layer"].add_module("conv", plain.inner["layer"])
    program = adaptc.compile(wrapped if is_wrapped else plain, tensors, config=CONFIG, example_inputs=x)
    torch.testing.assert_close(program(x), lora.train()(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_swap_takes_another_rank_and_says_its_scale() -> None:
    lora, model, x = pair("linear")
    program = adaptc.compile(model, LoraConfig(target_modules=["layer"]), example_inputs=x)
    tensors, before = loralib.lora_state_dict(lora), program.binding
    with pytest.raises(CheckpointError, match=r"loralib\) does not say its alpha.*LoraConfig\(r=3, lora_alpha=6\)"):
        adaptc.swap(program, tensors)
    assert program.binding is before
    adaptc.swap(program, tensors, config=CONFIG)
    torch.testing.assert_close(program(x), lora.train()(x), rtol=1e-5, atol=1e-5)


def test_a_config_keeps_its_own_patterns() -> None:
    """Layers that loralib stores by a smaller rank have a rank of their own, and others the config's."""
    torch.manual_seed(0)
    x = torch.randn(2, 7)
    lora = nn.Sequential(
        loralib.MergedLinear(7, 22, enable_lora=[True] * 2, r=2, lora_alpha=3), loralib.Linear(22, 5, r=4, lora_alpha=9)
    )
    model = nn.Sequential(nn.Linear(7, 22), nn.Linear(22, 5))
    model.load_state_dict({k: t for k, t in lora.state_dict().items() if "lora_" not in k})
    with torch.no_grad():
        for key, p in lora.named_parameters():
            p.normal_() if "lora_" in key else None
    config = LoraConfig(r=2, lora_alpha=3, rank_pattern={"1": 4}, alpha_pattern={"1": 9})
    program = adaptc.compile(model, loralib.lora_state_dict(lora), config=config, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(program(x), lora(x), rtol=1e-4, atol=1e-4)
    scaled = LoraConfig(r=2, lora_alpha=3, use_rslora=True)
    rooted = adaptc.compile(
        model[:1],
        {k: t for k, t in loralib.lora_state_dict(lora).items() if k[0] == "0"},
        config=scaled,
        example_inputs=x,
    )
    assert [m.scale(rooted.ops[i]) for i, m in rooted.binding.methods.items()] == pytest.approx([3 / 2**0.5])


A, B = "inner.layer.lora_A", "inner.layer.lora_B"
BROKEN = {
    "half": ("linear", {A: torch.ones(3, 7)}, r"'inner.layer' has lora_A and no lora_B"),
    "other half": ("linear", {B: torch.ones(11, 3)}, r"'inner.layer' has lora_B and no lora_A"),
    "no matrix": ("linear", {A: torch.ones(3), B: torch.ones(11, 3)}, r"shape \(3,\).*two matrices"),
    "no rank": ("linear", {A: torch.ones(0, 7), B: torch.ones(11, 0)}, r"expected two matrices"),
    "no rows": ("linear", {A: torch.ones(3, 7), B: torch.ones(0, 3)}, r"do not go with .*another model"),
    "ranks": ("linear", {A: torch.ones(4, 7), B: torch.ones(11, 3)}, r"not of one rank.*damaged"),
    "other model": (
        "linear",
        {A: torch.ones(3, 8), B: torch.ones(11, 3)},
        r"do not go with .*\(11, 7\).*another model",
    ),
    "other rows": ("linear", {A: torch.ones(3, 7), B: torch.ones(12, 3)}, r"do not go with .*another model"),
    "some blocks": (
        "merged",
        {A: torch.ones(6, 7), B: torch.ones(22, 3)},
        r"22 of the layer's 33 rows, so 2 of 3 blocks .*enable_lora.*lora_A of 9 rows and lora_B of 33, with zeros",
    ),
    "kernel": ("convolution", {A: torch.ones(9, 15), B: torch.ones(20, 9)}, r"kernel of shape \(7, 5, 3, 3\)"),
    "kernel of another size": ("convolution", {A: torch.ones(3, 5), B: torch.ones(7, 3)}, r"do not go with a kernel"),
    "kernel, rank": ("convolution", {A: torch.ones(8, 15), B: torch.ones(21, 8)}, r"do not go with a kernel"),
    "kernel, groups": ("convolution", {A: torch.ones(9, 5), B: torch.ones(63, 9)}, r"do not go with a kernel"),
    "kernel of two sizes": ("oblong", {A: torch.ones(9, 15), B: torch.ones(21, 9)}, r"kernel of shape \(7, 5, 3, 2\)"),
    "other rank": (
        "merged",
        {A: torch.ones(6, 7), B: torch.ones(33, 2)},
        r"has the rank 2, and the config says 3.*r=2",
    ),
    "mixed": ("linear", {A: torch.ones(3, 7), f"{A}.weight": torch.ones(3, 7)}, "not known in the format"),
    "no module": ("linear", {"other.lora_A": torch.ones(3, 7), "other.lora_B": torch.ones(11, 3)}, "no module of the"),
    "no such bias": (
        "embedding",
        {A: torch.ones(3, 13), B: torch.ones(7, 3), "inner.layer.bias": torch.ones(7)},
        "none",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    layer, tensors, match = BROKEN[name]
    _, make, make_input = LAYERS[layer]
    model, x = Layer(make()), make_input()
    with pytest.raises(AdaptcError, match=match):
        adaptc.compile(model, tensors, config=CONFIG, example_inputs=x)


def test_another_methods_config_is_refused() -> None:
    lora, model, x = pair("merged")
    with pytest.raises(ConfigError, match="give a LoraConfig"):
        adaptc.compile(model, loralib.lora_state_dict(lora), config=adaptc.LoHaConfig(r=3), example_inputs=x)


@torch.no_grad()
def test_blocks_that_are_zero_are_taken_as_the_error_says() -> None:
    torch.manual_seed(0)
    lora = Layer(loralib.MergedLinear(7, 33, enable_lora=[True, False, True], **SAID))
    model, x = Layer(nn.Linear(7, 33)), torch.randn(2, 7)
    model.load_state_dict({k: t for k, t in lora.state_dict().items() if "lora_" not in k})
    lora.inner["layer"].lora_B.normal_()
    a, b = lora.inner["layer"].lora_A, lora.inner["layer"].lora_B
    given = {A: torch.cat([a[:3], torch.zeros(3, 7), a[3:]]), B: torch.cat([b[:11], torch.zeros(11, 3), b[11:]])}
    program = adaptc.compile(model, given, config=CONFIG, example_inputs=x)
    torch.testing.assert_close(program(x), lora(x), rtol=1e-5, atol=1e-5)


def test_adaloras_keys_are_pefts() -> None:
    """They have the same ends, and a third factor."""
    model, x = Layer(nn.Linear(7, 11)), torch.randn(2, 7)
    config = AdaLoraConfig(target_r=2, init_r=3, target_modules=["layer"], total_step=9)
    made = adaptc.compile(model, config, example_inputs=x)
    tensors = {A: torch.randn(3, 7), B: torch.randn(11, 3), "inner.layer.lora_E": torch.randn(3, 1)}
    adaptc.swap(made, tensors, config=config)
    assert made.binding.origin.format == "PEFT"


def test_what_it_is_without_a_model(tmp_path: Path) -> None:
    lora, _, _ = pair("linear")
    tensors = loralib.lora_state_dict(lora)
    assert detect_format(tensors, "file")[0].name == "loralib"
    with pytest.raises(CheckpointError, match="no format that is known"):
        detect_format(["layer.weight", "layer.bias"], "a model")
    torch.save(tensors, tmp_path / "lora.pt")
    assert "loralib adapter in" in call("show", tmp_path / "lora.pt").output
