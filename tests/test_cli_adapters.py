"""The commands on adapters: files in, a PEFT directory out, and nothing where something is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptc
from tests.adapters.test_combine import randomize
from tests.support.combining import IDS, net
from tests.test_cli import call, refused


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of LoRA and one of LoHa, the base as a program, and one program with an adapter."""
    root = tmp_path_factory.mktemp("adapters")
    configs: dict[str, Any] = {
        "one": adaptc.LoraConfig(r=3, target_modules=["up", "down"]),
        "two": adaptc.LoraConfig(r=2, lora_alpha=5, target_modules=["up"]),
        "loha": adaptc.LoHaConfig(r=2, target_modules=["up", "down"]),
    }
    for i, (name, config) in enumerate(configs.items()):
        prog = adaptc.compile(net(), config, example_inputs=IDS)
        randomize(prog, i)
        adaptc.save_adapter(prog, root / name)
    adaptc.save(prog, root / "loha.pt2")
    adaptc.save(adaptc.unload(prog), root / "base.pt2")
    state = {k: t.contiguous() for k, t in net().state_dict().items()}
    save_file(state, root / "before.safetensors")
    changed = copy.deepcopy(state)
    changed["up.weight"] += torch.arange(7.0)[:, None] * torch.linspace(-1, 1, 10)
    save_file(changed, root / "after.safetensors")
    return root


def same(one: Path, other: adaptc.Adapter) -> None:
    found = adaptc.load_adapter(one)
    assert found.tensors.keys() == other.tensors.keys()
    for key, t in other.tensors.items():
        torch.testing.assert_close(found.tensors[key], t)


@pytest.mark.long
def test_combine(root: Path, tmp_path: Path):
    terms = [f"{root / 'one'}=0.5", f"{root / 'two'}=-0.3"]
    pairs = {root / "one": 0.5, root / "two": -0.3}
    out = call("combine", *terms, "-o", tmp_path / "a", "--method", "ties", "--density", "0.2").stdout
    assert f"wrote {tmp_path / 'a'}" in out
    same(tmp_path / "a", adaptc.combine(pairs, method="ties", density=0.2))
    call("combine", *terms, "-o", tmp_path / "b", "--method", "dare_linear", "--density", "0.7", "--seed", "5")
    drawn = torch.Generator().manual_seed(5)
    same(tmp_path / "b", adaptc.combine(pairs, method="dare_linear", density=0.7, generator=drawn))
    call("combine", *terms, "-o", tmp_path / "c", "--svd-rank", "2", "--svd-clamp", "0.9")
    same(tmp_path / "c", adaptc.combine(pairs, svd_rank=2, svd_clamp=0.9))
    more = [f"{root / 'one'}=1", f"{root / 'loha'}=-2", "--model", root / "base.pt2", "--json"]
    found = json.loads(call("combine", *more, "-o", tmp_path / "d").stdout)
    assert found["wrote"] == str(tmp_path / "d")
    assert {w["weight"] for w in found["weights"]} == {"up.weight", "down.weight"}


@pytest.mark.long
def test_to_lora(root: Path, tmp_path: Path):
    found = json.loads(call("to-lora", root / "loha.pt2", tmp_path / "a", "--rank", "9", "--json").stdout)
    assert found["error"] < 1e-6
    same(tmp_path / "a", adaptc.convert_to_lora(adaptc.load(root / "loha.pt2"), rank=9))
    out = call("to-lora", root / "loha", "--model", root / "base.pt2", "-o", tmp_path / "b", "--energy", "0.8").stdout
    assert "relative error" in out
    refused("to-lora", root / "loha", "-o", tmp_path / "c", "--rank", "3", said="known with the model")
    assert "one of --rank and --energy" in call("to-lora", root / "loha.pt2", "-o", tmp_path / "c", code=2).stderr
    assert not (tmp_path / "c").exists()


def test_extract(root: Path, tmp_path: Path):
    before, after = root / "before.safetensors", root / "after.safetensors"
    call("extract", after, before, "-o", tmp_path / "a", "--rank", "1")
    same(tmp_path / "a", adaptc.subtract_adapter(after, before, rank=1))
    call("extract", after, before, tmp_path / "b", "--energy", "0.99", "--target", "up")
    refused("extract", before, before, "-o", tmp_path / "c", "--rank", "1", said="no weight differs")
    assert not (tmp_path / "c").exists()


def test_what_is_wrong_is_said_and_nothing_is_written(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    one, two = f"{root / 'one'}=1", f"{root / 'two'}=1"
    refused("combine", one, two, "-o", out, "--method", "tie", said="method='tie' is not one of")
    refused("combine", one, two, "-o", out, "--method", "ties", said="needs density")
    refused("combine", one, f"{root / 'none'}=1", "-o", out, said="none")
    refused("combine", f"{root / 'one'}=nan", "-o", out, said="must be finite")
    assert "is no DIR=WEIGHT" in call("combine", str(root / "one"), "-o", out, code=2).stderr
    assert "give the output once" in call("combine", one, code=2).stderr
    assert not out.exists()
    out.mkdir()
    (out / "adapter_config.json").touch()
    refused("combine", one, two, "-o", out, said="is there already; --force replaces it")
    assert not (out / "adapter_config.json").read_bytes()
    call("combine", one, two, "-o", out, "--force")
    assert adaptc.load_adapter(out).config.peft_type == "LORA"
