"""Families that read images or audio in other ways than by grids: tokens are the model's, or a refusal says why not."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

import adaptc
from adaptc.capture.vision import tower_facts, trace_towers
from adaptc.generation.cache.cache_layout import HybridLayout
from adaptc.generation.modes import chunked_prefill
from tests.coverage.build import build_and_run
from tests.coverage.rows import all_rows

#: features in the place of placeholders, embeddings as they are, audio, padding that counts, images that look ahead
EQUAL = (
    "llava",
    "fuyu",
    "aya_vision",
    "internvl",
    "exaone4_5",
    "video_llava",
    "aria",
    "audioflamingo3",
    "gemma3",
    "paligemma",
    "idefics2",
    "idefics3",
    "smolvlm",
)
REFUSED = {
    "gemma3n": "takes per_layer_inputs beside a prompt's embeddings",
    "hunyuan_vl": "takes positions along 4 axes",
    "idefics": "hands no embeddings of its prompt to its language model, so pixel_values, image_attention_mask",
    "florence2": "example_inputs is not taken: Florence2ForConditionalGeneration has an encoder",
}
CONFIG = adaptc.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


@cache
def model_and_calls(family: str) -> tuple[Any, Any]:
    return build_and_run(next(r for r in all_rows() if r.family == family))


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", EQUAL)
def test_the_base_says_what_the_model_says(family: str) -> None:
    model, (example, call) = model_and_calls(family)
    gen = adaptc.compile_for_generation(model, CONFIG, example_inputs=example)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        want = model.generate(**call, **options)
        assert torch.equal(gen.base.generate(**call, **options), want)
        assert not torch.equal(gen(**call).logits, gen.base(**call).logits)


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_5", "inkling2"])
def test_states_go_on_from_a_prompt(family: str) -> None:
    """Models that keep states beside keys and values; transformers changes these at padding behind a prompt."""
    model, (example, call) = model_and_calls(family)
    gen = adaptc.compile_for_generation(model, CONFIG, example_inputs=example)
    assert isinstance(gen.spec.layout, HybridLayout)
    call = {**call, "attention_mask": torch.ones_like(call["attention_mask"])}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(gen.base.generate(**call, **options), model.generate(**call, **options))
        assert not torch.equal(gen(**call).logits, gen.base(**call).logits)


@pytest.mark.long
def test_images_that_look_ahead_are_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 2)
    model, (example, call) = model_and_calls("gemma3")
    gen = adaptc.compile_for_generation(model, CONFIG, example_inputs=example)
    assert gen.spec.looks_ahead
    with torch.no_grad():
        found, want = gen.base(**call, logits_to_keep=1).logits, model(**call).logits[:, -1:]
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", REFUSED)
def test_what_has_no_step_is_refused(family: str) -> None:
    model, (example, _) = model_and_calls(family)
    with pytest.raises(adaptc.AdaptcError, match=REFUSED[family]):
        adaptc.compile_for_generation(model, CONFIG, example_inputs=example)


@pytest.mark.long
def test_a_mask_that_leaves_out_keys_between_is_refused() -> None:
    model, (example, _) = model_and_calls("paligemma")
    kinds = torch.zeros_like(example["input_ids"])
    kinds[:, 2:5] = 1
    with pytest.raises(adaptc.CaptureError, match="attend to tokens after them and not to all between"):
        adaptc.compile_for_generation(model, CONFIG, example_inputs={**example, "token_type_ids": kinds})


@pytest.mark.long
def test_a_fixed_number_of_images_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is for a model that lists the features of its images in a way that nobody knows."""
    for module in (trace_towers, tower_facts):
        monkeypatch.setattr(module, "has_free_images", lambda model: False)
    model, (example, call) = model_and_calls("smolvlm")
    with pytest.warns(adaptc.AdaptcWarning, match=r"as many images or audio as the example has, 3 in 'pixel_"):
        gen = adaptc.compile_for_generation(model, CONFIG, example_inputs=example)
    with warnings.catch_warnings():
        assert gen.base.generate(**example, max_new_tokens=2).shape[0] == len(example["input_ids"])
    with pytest.raises(adaptc.AdaptcError, match="captured for exactly 3"):
        gen.generate(**call, max_new_tokens=2)
