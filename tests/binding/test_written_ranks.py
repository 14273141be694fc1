"""A bare state dict of other ranks than the program's config: what is written of it says the ranks that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from tests.support.gated_net import SITES, X, adapter_tensors, compile_net, net

KINDS: dict[str, Any] = {
    "lora": (adaptc.LoraConfig, {"init_lora_weights": False}),
    "dora": (adaptc.LoraConfig, {"init_lora_weights": False, "use_dora": True}),
    "rslora": (adaptc.LoraConfig, {"init_lora_weights": False, "use_rslora": True}),
    "loha": (adaptc.LoHaConfig, {"init_weights": False}),
    "hra": (adaptc.HRAConfig, {"init_weights": False}),
    "vera": (adaptc.VeraConfig, {"init_weights": False}),
}


def program(kind: str, rank: int) -> adaptc.AdaptedProgram:
    config, options = KINDS[kind]
    torch.manual_seed(rank)
    made = config(r=rank, target_modules=["up", "side"], **options)
    return adaptc.compile(net(), made, example_inputs=torch.randn(2, 5))


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", list(KINDS))
def test_another_rank_is_read_again(kind: str, tmp_path: Path) -> None:
    mine = program(kind, 3)
    adapter = load_file(adaptc.save_adapter(program(kind, 4), tmp_path / "b") / "adapter_model.safetensors")
    for _ in range(2):  # the second time by what is remembered of the first
        adaptc.swap(mine, adapter)
        y = mine(X)
        adaptc.save_adapter(mine, tmp_path / "a")
        assert mine.binding.config.r == 4  # type: ignore[attr-defined]
        adaptc.swap(mine, tmp_path / "a")
        torch.testing.assert_close(mine(X), y)
        adaptc.swap(mine, program(kind, 3).binding)
    if kind != "dora":  # PEFT's DoRA reads norms that it made of another base
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "a")).eval()
        torch.testing.assert_close(theirs(X), y, rtol=1e-4, atol=1e-5)


def test_several_ranks_are_a_pattern(tmp_path: Path) -> None:
    mine, wide = compile_net(3), adapter_tensors(5)
    adapter = {k: wide[k] if k.startswith("down") else t for k, t in adapter_tensors(2).items()}
    adaptc.swap(mine, adapter)
    y = mine(X)
    adaptc.save_adapter(mine, tmp_path / "a")
    config: Any = mine.binding.config
    assert (config.r, config.rank_pattern) == (2, {"down": 5})
    adaptc.swap(mine, tmp_path / "a")
    assert torch.equal(mine(X), y)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(theirs(X), y, rtol=1e-4, atol=1e-5)
    adaptc.swap(mine, adapter_tensors(4))
    assert (mine.binding.config.r, mine.binding.config.rank_pattern) == (4, {})  # type: ignore[attr-defined]
    assert len(SITES) == 3


def test_a_merge_or_a_saved_program_has_it_too(tmp_path: Path) -> None:
    mine = compile_net(3)
    adaptc.swap(mine, adapter_tensors(7))
    y = mine(X)
    loaded = adaptc.load(adaptc.save(mine, tmp_path / "p.pt2"))
    adaptc.save_adapter(loaded, tmp_path / "a")
    adaptc.swap(mine, tmp_path / "a")
    torch.testing.assert_close(mine(X), y)
