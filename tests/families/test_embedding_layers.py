"""save_embedding_layers: the base's embeddings travel with the adapter, for PEFT and for adaptc."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.adapter_files.directory import read_adapter
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return FAMILIES["llama"].build()


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_a_changed_vocabulary_travels_with_the_adapter(llama, targets, tmp_path):
    inputs = FAMILIES["llama"].inputs(2, 7)
    grown = FAMILIES["llama"].build()
    grown.load_state_dict(llama.state_dict())
    with torch.no_grad():
        grown.get_input_embeddings().weight[3:9].normal_()
    program = adaptc.compile(grown, LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    adaptc.save_adapter(program, tmp_path, save_embedding_layers=True)
    keys = read_adapter(tmp_path).tensors
    embedding = "model.embed_tokens.base_layer.weight" if "embed_tokens" in targets else "model.embed_tokens.weight"
    assert torch.equal(keys[embedding], grown.state_dict()["model.embed_tokens.weight"])
    plain = FAMILIES["llama"].build()
    plain.load_state_dict(llama.state_dict())
    theirs = PeftModel.from_pretrained(plain, str(tmp_path))(**inputs).logits
    torch.testing.assert_close(program(**inputs).logits, theirs, rtol=1e-5, atol=1e-6)
    other = adaptc.compile(llama, LoraConfig(r=2, target_modules=targets))
    adaptc.swap(other, tmp_path)
    torch.testing.assert_close(other(**inputs).logits, theirs, rtol=1e-5, atol=1e-6)


def test_a_program_without_embeddings_says_so(tmp_path):
    program = adaptc.compile(
        nn.Sequential(nn.Linear(3, 5)), LoraConfig(r=2, target_modules=["0"]), example_inputs=torch.randn(2, 3)
    )
    with pytest.raises(ConfigError, match="embed_tokens"):
        adaptc.save_adapter(program, tmp_path / "a", save_embedding_layers=True)
    assert not (tmp_path / "a").exists()
