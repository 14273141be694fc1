"""``enable_model_cpu_offload``: weights are on the device while a component runs there, and nothing is copied twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook

import adaptc
from adaptc.program.adapted_program import AdaptedProgram
from tests.support.pipelines import adapted, denoiser_inputs, images, pipeline, write_lora

HOME, THERE = torch.device("cpu"), torch.device("cpu:1")


def weights_of(program: Any) -> int:
    return sum(t.numel() for t in program.base_tensors.values())


def test_weights_are_on_a_device_only_between_its_calls() -> None:
    unet, inputs = adapted("sd").unet, denoiser_inputs("sd", torch.float32)
    expected, home = unet(**inputs).sample, unet.state
    _, hook = cpu_offload_with_hook(unet, torch.device("meta"))
    copies: list[Any] = []
    for _ in range(2):
        assert unet(**inputs).sample.is_meta
        assert {t.device.type for t in unet.parameters()} == {"meta"}
        assert weights_of(unet.state.program) == weights_of(home.program)
        copies.append(unet.state.program)
        hook.offload()
        assert weights_of(copies[-1]) == 0
        assert unet.state.program is home.program
        assert all(unet.state.adapters[n].binding is a.binding for n, a in home.adapters.items())
    assert copies[0] is copies[1]
    hook.remove()
    assert torch.equal(unet(**inputs).sample, expected)


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Another device, whose memory is the CPU's in truth. Return the programs that are copied to it from now on."""
    copied: list[Any] = []

    def to(program: Any, device: torch.device) -> Any:
        if program.device == device:
            return program
        copied.append(program)
        made = copy.deepcopy(program)
        vars(made)["pretended_device"] = device
        return made

    monkeypatch.setattr(AdaptedProgram, "to", to)
    monkeypatch.setattr(AdaptedProgram, "device", property(lambda p: vars(p).get("pretended_device", HOME)))
    monkeypatch.setattr("adaptc.pipelines.component_module.usable_device", torch.device)
    # It compares the devices of tensors, which are those of the CPU.
    monkeypatch.setattr("adaptc.binding.bind_adapter._check_binding", lambda target, binding: binding)
    return copied


@pytest.mark.long
def test_images_are_the_same_whatever_is_done_between_calls(pretended_device: list[Any], tmp_path: Path) -> None:
    ours = adaptc.compile(pipeline("sd"), write_lora("sd", tmp_path / "a", seed=3), adapter_name="a")
    ours.load_lora_weights(write_lora("sd", tmp_path / "b", seed=4), adapter_name="b")

    def all_images(times: int) -> list[torch.Tensor]:
        ours.set_adapters("b")
        made = [images(ours, "sd") for _ in range(times)]
        ours.set_adapters(["a", "b"], [0.3, 0.4])
        made += [images(ours, "sd") for _ in range(times)]
        ours.fuse_lora()
        made += [images(ours, "sd") for _ in range(times)]
        ours.unfuse_lora()
        return [*made, images(ours, "sd")]

    first, second, third, fourth = all_images(1)
    ours.enable_model_cpu_offload(device=THERE)
    found = all_images(2)
    for given, expected in zip(found, [first, first, second, second, third, third, fourth], strict=True):
        assert torch.equal(given, expected)
    assert not torch.equal(first, second)
    assert ours.unet.device == HOME
    assert len(pretended_device) == 4  # the denoiser and the text encoder, and what they are with adapters fused
