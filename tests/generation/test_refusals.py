"""What a generation is refused for: named, before anything is computed, with the caller's cache as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import adaptc
from adaptc.generation.cache.step_cache import StepCache
from tests.generation.models import case, generated, generator, prompt
from tests.support.families import FAMILIES

IDS = prompt(2, 6)["input_ids"]

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "too long": ({"input_ids": IDS}, {"new": 44}, r"49 positions are more than max_length=48.*max_new_tokens"),
    "too many rows": ({"input_ids": prompt(13, 3)["input_ids"]}, {}, "13 rows are more than max_batch=12"),
    "too many beams": ({"input_ids": IDS}, {"num_beams": 7}, r"14 rows \(2 of 7 sequences each\)"),
    "unknown token": ({"input_ids": IDS + 57}, {}, "outside the vocabulary of 61"),
    "negative token": ({"input_ids": IDS - 61}, {}, "outside the vocabulary of 61"),
    "floats": (
        {"input_ids": IDS.float()},
        {},
        "must be a tensor .batch, tokens. of int64, got .2, 6. of torch.float32",
    ),
    "one row": ({"input_ids": IDS[0]}, {}, r"must be a tensor .batch, tokens. of int64, got .6,."),
    "no rows": ({"input_ids": IDS[:0]}, {}, "no rows"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, {}, r"attention_mask must be .*\(2, 6\)"),
    "mask of other rows": ({"input_ids": IDS, "attention_mask": torch.ones(3, 6)}, {}, r"got \(3, 6\)"),
    "narrow embeddings": (
        {"inputs_embeds": torch.zeros(2, 6, 7)},
        {},
        r"inputs_embeds must be .*24\), got \(2, 6, 7\)",
    ),
    "no cache": ({"input_ids": IDS}, {"use_cache": False}, "use_cache=False"),
    "other cache": ({"input_ids": IDS}, {"cache_implementation": "static"}, "cache_implementation"),
    "attentions": ({"input_ids": IDS}, {"output_attentions": True}, "output_attentions"),
    "hidden states": ({"input_ids": IDS}, {"output_hidden_states": True}, "output_hidden_states"),
    "misspelled": ({"input_ids": IDS}, {"max_new_tokes": 4}, "max_new_tokes"),
    "contrastive": ({"input_ids": IDS}, {"penalty_alpha": 0.5, "top_k": 4}, "Contrastive Search"),
    "groups": ({"input_ids": IDS}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3}, "Group Beam"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, how, message = BAD[what]
    gen, steps = generator(), []
    monkeypatch.setattr(type(gen.spec.cache_mode), "run", lambda *args, **kwargs: steps.append(1))
    with pytest.raises(adaptc.AdaptcError, match=message):
        generated(gen, given, **how)
    assert not steps


def _foreign(what: str) -> Any:
    if what == "transformers'":
        return transformers.DynamicCache()
    if what == "another program's":
        return generator("gpt2").prefill(IDS)
    return generator().prefill(prompt(*(3, 4) if what == "of other rows" else (2, 8))["input_ids"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("transformers'", "a DynamicCache is no cache of this program"),
        ("another program's", "of another program"),
        ("of other rows", "3 rows and this generation 2"),
        ("longer than the prompt", r"holds 8 positions and the prompt has 6"),
    ],
)
def test_caches_that_do_not_fit(what: str, message: str) -> None:
    gen, past = generator(), _foreign(what)
    before = [t.clone() for t in past.tensors] if isinstance(past, StepCache) else []
    with pytest.raises(adaptc.AdaptcError, match=message):
        generated(gen, IDS, past_key_values=past)
    if isinstance(past, StepCache):
        assert all(map(torch.equal, before, past.tensors))


def test_a_full_cache_says_so() -> None:
    gen = generator()
    past = gen.prefill(prompt(1, 47)["input_ids"])
    gen.forward(IDS[:1, :1], past_key_values=past)
    with pytest.raises(adaptc.AdaptcError, match="49 positions are more than max_length=48"):
        gen.forward(IDS[:1, :1], past_key_values=past)
    assert past.length == 48


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_length": 65}, "max_length=65 is more than the 64 positions"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_batch": True}, "max_batch=True"),
    ],
)
def test_sizes_that_make_no_sense(how: dict[str, Any], message: str) -> None:
    with pytest.raises(adaptc.ConfigError, match=message):
        adaptc.compile_for_generation(case("llama").model, adaptc.LoraConfig(), **how)


def test_models_that_do_not_generate() -> None:
    with pytest.raises(adaptc.CaptureError, match="takes a transformers model, not a Linear"):
        adaptc.compile_for_generation(torch.nn.Linear(3, 5), adaptc.LoraConfig())


def test_batches_in_pages_are_refused() -> None:
    with pytest.raises(adaptc.AdaptcError, match="generate_batch"):
        generator().generate_batch([[5, 6]])


XLM = {"vocab_size": 61, "emb_dim": 24, "n_layers": 2, "n_heads": 3, "mask_index": 5, "max_position_embeddings": 32}
XLNET = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 37}


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields"),
    [("XLMWithLMHeadModel", "XLMConfig", XLM), ("XLNetLMHeadModel", "XLNetConfig", XLNET)],
)
def test_models_that_add_tokens_to_a_prompt(model_class: str, config_class: str, fields: dict[str, int]) -> None:
    """A step without these tokens would give other ones than the model, and nobody would be told."""
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
    with pytest.raises(adaptc.CaptureError, match=f"{model_class} adds tokens of its own to a prompt"):
        adaptc.compile_for_generation(model, adaptc.LoraConfig(r=2, target_modules="all-linear"), max_length=16)


class Noted(transformers.LlamaForCausalLM):
    """It writes down what it was asked last, as Qwen2-VL does its positions."""

    last_prompt: Any = None

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        self.last_prompt = input_ids
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def test_asking_a_model_for_its_tokens_leaves_it_as_it_was() -> None:
    model = Noted(FAMILIES["llama"].build().config).eval()
    adaptc.compile_for_generation(model, adaptc.LoraConfig(r=2, target_modules=["q_proj"]), max_length=16)
    assert model.last_prompt is None
