"""Options of ``generate`` that cannot be are refused by name; those that a model's config was left with are not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, GenerationConfig

import adaptc
from adaptc.generation.description import SPEC_FILE, facts_of
from tests.generation.models import case, generated, generator, prompt

IDS = prompt(2, 5)["input_ids"]
ODD: dict[str, list[Any]] = {
    "max_new_tokens": [-3, 0, "3", 2.5, [3], float("nan"), 10**12],
    "max_length": ["9"],
    "min_new_tokens": ["a"],
    "num_beams": [0, -1, "2", 1.5, True],
    "num_return_sequences": [0, "2", 3],
    "top_k": ["5", 2.5],
    "top_p": ["x"],
    "temperature": ["hot"],
    "repetition_penalty": ["x", -1.0],
    "no_repeat_ngram_size": ["2"],
    "length_penalty": ["x"],
    "guidance_scale": ["x"],
    "max_time": ["x"],
    "eos_token_id": ["a", 1.5, ["a"], [[1.5]]],
    "pad_token_id": ["a"],
    "suppress_tokens": [3.5, "x"],
    "forced_eos_token_id": [10**6, "x"],
    "bos_token_id": [-1],
    "do_sample": ["yes"],
    "use_cache": ["x", False],
    "return_dict": [False],
    "output_scores": ["x"],
    "generation_config": [{"max_new_tokens": 2}, "x", 3],
    "streamer": [3],
    "logits_processor": [3, [3]],
    "stopping_criteria": [3, [3]],
    "prefix_allowed_tokens_fn": [3],
    "assistant_model": [3],
    "prompt_lookup_num_tokens": ["a", 0],
    "negative_prompt_ids": [3],
    "bad_words_ids": [3, [[-5]]],
    "sequence_bias": [3],
    "custom_generate": ["there is no such directory"],
    "watermarking_config": [3],
    "attention_mask": [[[1] * 5] * 2, np.ones((2, 5)), torch.ones(5)],
    "position_ids": [[[0]], torch.zeros(2, 3, dtype=torch.int64)],
    "past_key_values": [3, ((torch.zeros(1),),)],
    "inputs_embeds": [[[1.0]], torch.zeros(2, 5, 3)],
    "adapter_scale": ["x"],
    "labels": [IDS],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_options_that_cannot_be(family: str) -> None:
    gen = generator(family)
    for name, values in ODD.items():
        for value in values:
            how = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, name: value}
            if name == "attention_mask" and family == "t5" and isinstance(value, np.ndarray):
                value = value.tolist()
            with pytest.raises(adaptc.AdaptcError):
                gen.generate(IDS, **how)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("by_name", [True, False])
def test_prompts_that_are_no_tensors(family: str, by_name: bool) -> None:
    gen = generator(family)
    for strange in ([[1, 2]], np.ones((1, 2), dtype=np.int64), BatchEncoding({"input_ids": IDS}), "a text", 3):
        with pytest.raises(adaptc.AdaptcError, match=r"gen.generate\(input_ids=torch.as_tensor\(input_ids\)\)"):
            gen.generate(input_ids=strange) if by_name else gen.generate(strange)
    with pytest.raises(adaptc.AdaptcError, match="has no tokens"):
        gen.generate(IDS[:, :0])


@pytest.mark.long
def test_a_config_that_training_left_without_a_cache() -> None:
    found = case("llama")
    model = copy.deepcopy(found.model)
    model.config.use_cache = model.generation_config.use_cache = False
    gen = adaptc.compile_for_generation(model, found.adapters["first"], max_batch=12, max_length=48)
    assert gen.generation_config.use_cache is False
    expected = generated(generator(), prompt(2, 5))
    assert torch.equal(generated(gen, prompt(2, 5)), expected)
    own = GenerationConfig(max_new_tokens=9, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(gen.generate(**prompt(2, 5), generation_config=own, eos_token_id=None), expected)
    with pytest.raises(adaptc.AdaptcError, match="use_cache=False is not taken"):
        generated(gen, prompt(2, 5), use_cache=False)


def understood(files: dict[str, bytes]) -> Any:
    """The generation config in what a package carries."""
    inputs = generator().program.adaptation.inputs(generator().program).names
    return facts_of(json.loads(files[SPEC_FILE]), inputs).generation_config


@pytest.mark.long
def test_what_was_added_to_a_generation_config_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = generator()
    config: Any = GenerationConfig.from_model_config(case("llama").model.config)
    config._from_model_config = True
    config.house_rules, config.retries = {"tone": ["kind", "short"]}, 7
    monkeypatch.setattr(gen, "generation_config", config)
    for other in (gen.bind(None), gen.base, copy.copy(gen), copy.deepcopy(gen), gen.bank({}).select([None])):
        assert other.generation_config.retries == 7
    files = gen.package_files(None)
    read = understood(files)
    for found in (adaptc.load(adaptc.save(gen, tmp_path / "gen.pt2")).generation_config, read):
        assert (found.house_rules, found.retries) == ({"tone": ["kind", "short"]}, 7)
    config.house_rules = object()
    with pytest.raises(adaptc.ConfigError, match=r"generation_config.house_rules is .* which no file"):
        adaptc.save(gen, tmp_path / "more.pt2")
