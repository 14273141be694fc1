"""Files of users that are no plain files, or nested without an end: an error that names them, and no wait."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptc
from adaptc import AdaptcError, LoraConfig
from adaptc.binding.sources.configs import read_config_file
from adaptc.capture.model_files import is_gguf, read_model
from tests.support.hurried import time_limit
from tests.test_cli import call, refused


@pytest.fixture(scope="module")
def prog() -> adaptc.AdaptedProgram:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    return adaptc.compile(nn.Sequential(nn.Linear(6, 7)), config, example_inputs=torch.randn(2, 6))


def nested(text: str, depth: int) -> str:
    """Valid JSON with a field that has no bottom."""
    start, end = ('{"a": ', "}") if depth % 2 else ("[", "]")
    return f'{{"unknown": {start * depth}1{end * depth}, {text.strip()[1:]}'


@pytest.mark.parametrize("depth", [33, 301, 500, 900, 901, 100_000])
def test_configs_without_a_bottom(prog: adaptc.AdaptedProgram, depth: int, tmp_path: Path) -> None:
    adaptc.save_adapter(prog, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(nested(file.read_text(), depth))
    model, x = nn.Sequential(nn.Linear(6, 7)), torch.randn(2, 6)
    calls: list[Callable[[], Any]] = [
        lambda: adaptc.swap(prog, tmp_path / "a"),
        lambda: prog.bind(tmp_path / "a"),
        lambda: adaptc.compile(model, tmp_path / "a", example_inputs=x),
        lambda: adaptc.load_adapter(tmp_path / "a"),
        lambda: adaptc.combine({str(tmp_path / "a"): 1.0}),
        lambda: read_config_file(file),
    ]
    for read in calls:
        with pytest.raises(AdaptcError, match=r"adapter_config.json .*(nested deeper than 32|RecursionError)"):
            read()
    refused("show", tmp_path / "a", said="adapter_config.json")
    prog(x)


@pytest.mark.parametrize("depth", [40, 900])
def test_configs_in_memory_and_in_headers_without_a_bottom(
    prog: adaptc.AdaptedProgram, depth: int, tmp_path: Path
) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = {"a": deep}
    state = prog.module().state_dict()
    for config in ({"peft_type": "LORA", "r": 3, "rank_pattern": deep}, {"peft_type": "LORA", "loftq_config": deep}):
        with pytest.raises(AdaptcError, match=r"rank_pattern|loftq_config"):
            prog.bind(state, config=config)
    text = nested('{"r": 3}', depth)
    save_file(
        {"unet.0.lora.down.weight": torch.ones(3, 6)}, tmp_path / "f.safetensors", {"lora_adapter_metadata": text}
    )
    with pytest.raises(AdaptcError, match="lora_adapter_metadata in its header"):
        adaptc.swap(prog, tmp_path / "f.safetensors")
    program = adaptc.save(prog, tmp_path / "p.pt2")
    assert "no JSON" in call("swap", program, "a", "o.pt2", "--key-mapping", "[" * 100_000, code=2).stderr


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)])
def test_what_is_no_plain_file(prog: adaptc.AdaptedProgram, make: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    adaptc.save_adapter(prog, whole)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        odd = tmp_path / name.partition(".")[0]
        shutil.copytree(whole, odd)
        (odd / name).unlink()
        make(odd / name)
        for read in (adaptc.load_adapter, lambda p: adaptc.swap(prog, p)):
            with time_limit(), pytest.raises(AdaptcError):
                read(odd)
    file = tmp_path / "config.json"
    make(file)
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    make(tmp_path / "run" / "checkpoint-1" / "trainer_state.json")
    with time_limit():
        for read in (read_config_file, adaptc.load, adaptc.load_package):
            with pytest.raises(AdaptcError):
                read(file)
        with pytest.raises(AdaptcError, match=r"config.json|no model"):
            read_model(tmp_path)
        assert not is_gguf(file)
        assert adaptc.training.last_checkpoint(tmp_path / "run") is None
        for command in (["show", file], ["compile", file, whole, "-o", tmp_path / "o.pt2"], ["verify", file]):
            call(*command, code=1)
    assert json.loads((whole / "adapter_config.json").read_text())["peft_type"] == "LORA"
