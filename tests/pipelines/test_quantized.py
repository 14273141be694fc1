"""Adapters on quantised denoisers act as on the same denoisers with their weights dequantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import adaptc
from adaptc.debug import assert_no_recompiles
from tests.support.pipelines import DENOISER, images, pipeline, write_lora


def _by_torchao(module: nn.Module) -> None:
    quantize_(module, Int8WeightOnlyConfig())


QUANTIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "int8": lambda m: adaptc.quantize(m, "int8"),
    "int4": lambda m: adaptc.quantize(m, "int4"),
    "nf4": lambda m: adaptc.quantize(m, "nf4"),
    "torchao": _by_torchao,
}


def dequantized(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    count = 0
    for inner in made.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if type(parameter.data) is not Tensor:
                value = parameter.dequantize().detach().clone()
                setattr(inner, name, nn.Parameter(value, requires_grad=False))
                count += 1
    assert count > 5, "nothing is quantised"
    return made


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["flux", "sd"])
def test_adapters_act_on_quantised_weights(name: str, quantizer: str, tmp_path: Path) -> None:
    files = [write_lora(name, tmp_path / str(seed), seed=seed, text=False, r=2 + seed) for seed in (1, 2)]
    base, theirs = pipeline(name), pipeline(name)
    part = DENOISER[name]
    QUANTIZERS[quantizer](getattr(base, part))
    vars(theirs)[part] = dequantized(getattr(base, part))
    plain = images(theirs, name)
    assert (plain - images(pipeline(name), name)).abs().max() > 1e-4
    ours = adaptc.compile(base, files[0])
    theirs.load_lora_weights(files[0], adapter_name="one")
    got = images(ours, name)
    close(got, wanted := images(theirs, name))
    assert (wanted - plain).abs().max() > 1e-2
    theirs.load_lora_weights(files[1], adapter_name="two")
    with assert_no_recompiles():
        ours.load_lora_weights(files[1], adapter_name="two")
        ours.set_adapters(["default", "two"], [0.5, 1.5])
        both = images(ours, name)
    theirs.set_adapters(["one", "two"], [0.5, 1.5])
    close(both, images(theirs, name))
    ours.disable_lora()
    close(images(ours, name), plain)
    ours.enable_lora()
    with pytest.raises(adaptc.MergeError, match="dequantize=True or requantize=True"):
        ours.fuse_lora()
    ours.fuse_lora(dequantize=True)
    close(images(ours, name), both)
    ours.unfuse_lora()
    assert torch.equal(images(ours, name), both)
    ours.unload_lora_weights()
    close(images(ours, name), plain)


@pytest.mark.long
def test_requantised_weights_have_an_error_of_their_own(tmp_path: Path) -> None:
    base = pipeline("flux")
    adaptc.quantize(base.transformer, "int8")
    ours = adaptc.compile(base, write_lora("flux", tmp_path, text=False))
    wanted = images(ours, "flux")
    ours.fuse_lora(requantize=True)
    error = (images(ours, "flux") - wanted).abs().max()
    assert 1e-6 < error < 0.05
    ours.unfuse_lora()
    assert torch.equal(images(ours, "flux"), wanted)
    with pytest.raises(adaptc.ConfigError):
        ours.fuse_lora(requantize=True, dequantize=True)


@pytest.mark.long
def test_an_adapter_of_each_image_on_quantised_weights(tmp_path: Path) -> None:
    base = pipeline("flux")
    adaptc.quantize(base.transformer, "nf4")
    ours = adaptc.compile(base, write_lora("flux", tmp_path, text=False), adapter_name="film")
    two: dict[str, Any] = {"prompt_embeds": torch.randn(2, 7, 32), "pooled_prompt_embeds": torch.randn(2, 32)}
    mixed = images(ours, "flux", **two, adapters=["film", None])
    close(mixed[:1], images(ours, "flux", **two)[:1])
    ours.disable_lora()
    close(mixed[1:], images(ours, "flux", **two)[1:])
