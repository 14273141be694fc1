"""Ways to generate that are transformers' own, driven over a step program."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)

from tests.generation.models import case, generated, generator, prompt


class Forbid(LogitsProcessor):
    """Lets no even token through."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, ::2] = float("-inf")
        return scores


def five_more(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


WAYS: dict[str, dict[str, Any]] = {
    "top k and p": {"do_sample": True, "top_k": 7, "top_p": 0.9, "temperature": 1.3},
    "beams": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    "drawn beams": {"num_beams": 3, "do_sample": True},
    "stops": {"eos_token_id": list(range(4, 61, 3))},
    "no repeats": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "in chunks": {"prefill_chunk_size": 3},
    "guided": {"guidance_scale": 1.5},
    "processor": {"logits_processor": LogitsProcessorList([Forbid()])},
    "criterion": {"stopping_criteria": StoppingCriteriaList([five_more])},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    found, gen = case("llama"), generator()
    rows = 1 if way == "looked up" else 3
    text = prompt(rows, 7, (2, 0, 3)[:rows] if rows > 1 else ())
    assert torch.equal(generated(gen, text, **WAYS[way]), found.expected("first", text, **WAYS[way]))


def test_it_is_what_transformers_generates_with() -> None:
    gen = generator()
    assert isinstance(gen, GenerationMixin)
    assert gen.can_generate()
    assert gen.device == torch.device("cpu")
    assert gen.dtype == torch.float32


def test_assisted() -> None:
    """With another model's guesses, and as the one that guesses."""
    found, gen, text = case("llama"), generator(), prompt(1, 7)
    draft = copy.deepcopy(found.model)
    expected = found.expected("first", text)
    assert torch.equal(generated(gen, text, assistant_model=draft), expected)
    assert torch.equal(generated(gen, text, assistant_model=gen.base), expected)
    assert torch.equal(found.expected("first", text, assistant_model=gen.base), expected)


def test_embeddings_are_a_prompt() -> None:
    found, gen = case("llama"), generator()
    text = prompt(2, 6, (2, 0))
    embeds = found.model.get_input_embeddings()(text.pop("input_ids")).detach() * 1.1
    given = {"inputs_embeds": embeds, **text}
    for how in ({}, {"num_beams": 2}):
        assert torch.equal(generated(gen, given, **how), found.expected("first", given, **how))


def test_logits() -> None:
    found, gen, text = case("llama"), generator(), prompt(2, 6, (2, 0))
    how = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    ours, theirs = generated(gen, text, **how), found.expected("first", text, **how)
    for name in ("logits", "scores"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b)


def test_the_last_logits_alone_are_computed() -> None:
    gen, text = generator(), prompt(2, 6)
    whole = gen.forward(text["input_ids"]).logits
    assert whole.shape[1] == 6
    for keep in (1, 3, torch.tensor([0, 4])):
        kept = gen.forward(text["input_ids"], logits_to_keep=keep).logits
        index = torch.arange(6)[-keep:] if isinstance(keep, int) else keep
        torch.testing.assert_close(kept, whole[:, index])


def test_streams() -> None:
    got: list[torch.Tensor] = []

    class Stream:
        def put(self, value: torch.Tensor) -> None:
            got.append(value.flatten())

        def end(self) -> None:
            got.append(torch.tensor([-1]))

    out = generated(generator(), prompt(1, 5), streamer=Stream())
    assert torch.equal(torch.cat(got), torch.cat([out[0], torch.tensor([-1])]))
    assert len(got) == 11


def test_a_generation_config_is_taken() -> None:
    found, gen, text = case("llama"), generator(), prompt(2, 6)
    config = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(
        gen.generate(**text, generation_config=config), found.expected("first", text, num_beams=2, new=4)
    )


def test_no_prompt_begins_a_text() -> None:
    gen = generator()
    out = gen.generate(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out, generated(gen, {"input_ids": torch.tensor([[1]])}, new=3))


def test_stop_strings() -> None:
    """With a tokenizer whose words are w1 to w60, and the one that transformers tries tokenizers with."""
    vocabulary = {"abcdef": 0, **{f"w{i}": i for i in range(1, 61)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="abcdef"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    found, gen, text = case("llama"), generator(), prompt(1, 6)
    fourth = int(found.expected("first", text)[0, 9])
    how = {"stop_strings": [f"w{fourth}"], "tokenizer": tokenizer}
    out = generated(gen, text, **how)
    assert torch.equal(out, found.expected("first", text, **how))
    assert out.shape[1] <= 10
