"""What a new adapter says of its base: PEFT's Auto classes load what adaptc writes, and the model card is PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.adapter_files.directory import read_adapter

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def loaded(base: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.long
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_auto_classes_load_what_is_written(task: str | None, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=task)
    prog = adaptc.compile(loaded(base), config)
    adaptc.save_adapter(prog, tmp_path)
    auto = peft.AutoPeftModel if task is None else peft.AutoPeftModelForCausalLM
    theirs = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got, wanted = theirs(input_ids=IDS).logits, prog(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert config.base_model_name_or_path is None, "the caller's config was written to"


@pytest.mark.long
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_config_and_card_are_pefts(task: str | None, base: Path, tmp_path: Path) -> None:
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": task}
    peft.get_peft_model(loaded(base), peft.LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    prog = adaptc.compile(loaded(base), LoraConfig(**options))
    adaptc.save_adapter(prog, tmp_path / "ours")
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")]
    for c in configs:
        c["target_modules"] = sorted(c["target_modules"])
    assert configs[0] == configs[1]
    cards = [huggingface_hub.metadata_load(tmp_path / d / "README.md") for d in ("ours", "theirs")]
    assert cards[0] == cards[1]
    # The file of a program keeps it.
    adaptc.save(prog, tmp_path / "p.pt2")
    adaptc.save_adapter(adaptc.load(tmp_path / "p.pt2"), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {k: again[k] for k in ("base_model_name_or_path", "auto_mapping")} == {
        k: configs[1][k] for k in ("base_model_name_or_path", "auto_mapping")
    }


@pytest.mark.long
def test_what_a_file_says_of_its_base_stays(base: Path, tmp_path: Path) -> None:
    said = LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path="org/other")
    adaptc.save_adapter(adaptc.compile(loaded(base), said), tmp_path / "one")
    adaptc.save_adapter(adaptc.compile(loaded(base), tmp_path / "one"), tmp_path / "two")
    for name in ("one", "two"):
        assert read_adapter(tmp_path / name).config["base_model_name_or_path"] == "org/other"


@pytest.mark.long
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_saved_embeddings_survive_a_save(target: str, changed: bool, base: Path, tmp_path: Path) -> None:
    """PEFT writes embeddings that it adapts or is asked for: equal to the base's or not, they are in the next file."""
    model = loaded(base)
    if changed:
        with torch.no_grad():
            model.get_input_embeddings().weight += 1
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=[target], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    kept = {k: t for k, t in read_adapter(tmp_path / "theirs").tensors.items() if "lora" not in k}
    assert any("embed_tokens" in k for k in kept)
    prog = adaptc.compile(loaded(base), tmp_path / "theirs")
    adaptc.save_adapter(prog, tmp_path / "one")
    adaptc.save(prog, tmp_path / "p.pt2")
    adaptc.save_adapter(adaptc.load(tmp_path / "p.pt2"), tmp_path / "two")
    other = adaptc.compile(loaded(base), LoraConfig(r=2, target_modules=[target]))
    adaptc.swap(other, tmp_path / "theirs")
    adaptc.save_adapter(other, tmp_path / "three")
    wanted = read_adapter(tmp_path / "theirs").tensors
    for name in ("one", "two", "three"):
        found = read_adapter(tmp_path / name).tensors
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[k], t) for k, t in wanted.items()), name
