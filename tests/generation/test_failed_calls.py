"""A call that failed before it computed anything has changed nothing: the caller's cache is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.generation import encoder_decoder
from adaptc.generation.cache.step_cache import StepCache
from tests.generation.models import generated, generator, prompt
from tests.generation.test_recurrent_models import both
from tests.generation.test_uncached_models import whole

#: refused by adaptc, by transformers, and by what transformers calls before the first step
BAD: dict[str, dict[str, Any]] = {
    "too long": {"new": 99},
    "beams": {"num_beams": 2},
    "several": {"num_return_sequences": 2},
    "misspelled": {"max_new_tokes": 3},
    "nothing new": {"new": 0},
    "no tokenizer": {"stop_strings": ["a"]},
    "no words": {"bad_words_ids": [[-5]]},
    "a scale": {"adapter_scale": float("nan")},
    "a streamer": {"streamer": 3},
    "processors": {"logits_processor": 3},
}


def made(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """What generates, and a text of which the last token can be computed again."""
    if kind == "state":
        return both()[1], prompt(2, 1)
    if kind == "text":
        return whole(), prompt(2, 7, (3, 0))
    return generator(kind), prompt(2, 5, (3, 0))


def all_of(past: StepCache) -> tuple[Any, ...]:
    rings = past.length, past.rows, past.ring_start, past.ring_high_water, past.prefix_length
    return (*rings, past.mask.tolist(), [t.clone() for t in past.tensors])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "state", "text"])
def test_a_cache_of_the_whole_prompt_is_as_it_was(kind: str) -> None:
    gen, text = made(kind)
    past = gen.prefill(**text)
    *facts, tensors = all_of(past)
    for what, how in BAD.items():
        with pytest.raises((adaptc.AdaptcError, AttributeError, TypeError)):
            generated(gen, text, past_key_values=past, **how)
        *now, same = all_of(past)
        assert now == facts, what
        assert all(map(torch.equal, tensors, same)), what
    assert torch.equal(generated(gen, text, past_key_values=past), generated(gen, text))


@pytest.mark.filterwarnings("ignore")
def test_a_cache_of_an_encoder_is_as_it_was() -> None:
    """Beams have rows of their own in it, which a call that failed before has not made."""
    gen, ids = generator("t5"), torch.tensor([[5, 9, 11], [7, 4, 20]])
    past, start = gen.prefill(ids), torch.ones(2, 1, dtype=torch.int64)
    facts = past.rows, past.length, past.states.shape, [t.shape for t in past.cross_tensors]
    for what, how in {**BAD, "beams": {"num_beams": 2, "logits_processor": 3}, "several": {"num_beams": 99}}.items():
        how = {"max_new_tokens": 3, "do_sample": False, **how}
        how["max_new_tokens"] = how.pop("new", how["max_new_tokens"])
        with pytest.raises((adaptc.AdaptcError, AttributeError, TypeError)):
            gen.generate(past_key_values=past, decoder_input_ids=start, **how)
        assert (past.rows, past.length, past.states.shape, [t.shape for t in past.cross_tensors]) == facts, what
    how = {"max_new_tokens": 3, "do_sample": False, "decoder_start_token_id": 1, "num_beams": 2}
    found = gen.generate(past_key_values=past, decoder_input_ids=start, **how)
    assert torch.equal(found, gen.generate(ids, **how))


def test_a_step_of_a_decoder_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gen, ids, new = generator("t5"), torch.tensor([[5, 9, 11], [7, 4, 20]]), torch.tensor([[4, 5], [7, 8]])
    past = gen.prefill(ids)
    gen.forward(decoder_input_ids=new, past_key_values=past)
    expected = gen.forward(decoder_input_ids=new, past_key_values=past.copy()).logits
    for given, message in (
        ({"decoder_input_ids": new[:, :0]}, "has no tokens"),
        ({"decoder_input_ids": new, "logits_to_keep": "all"}, "logits_to_keep='all' must be a number"),
        ({"decoder_input_ids": new, "logits_to_keep": torch.tensor([2])}, "those among 2"),
    ):
        with pytest.raises(adaptc.AdaptcError, match=message):
            gen.forward(past_key_values=past, **given)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(encoder_decoder, "_run_part", fail)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        with pytest.raises(RuntimeError, match="out of memory"):
            gen.forward(decoder_input_ids=new, decoder_attention_mask=mask, past_key_values=past)
    assert past.length == 2
    found = gen.forward(decoder_input_ids=new, past_key_values=past).logits
    torch.testing.assert_close(found, expected)


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "has no tokens"),
    "unknown tokens": ({"input_ids": torch.full((2, 3), 61)}, "outside the vocabulary of 61"),
    "one row": ({"input_ids": torch.tensor([3, 4])}, r"input_ids must be a tensor \(batch, tokens\)"),
    "positions of others": ({"position_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"position_ids must .*\(2, 3\)"),
    "positions of other rows": ({"position_ids": torch.zeros(3, 3, dtype=torch.int64)}, r"got \(3, 3\) of torch.int64"),
    "broken positions": ({"position_ids": torch.zeros(2, 3)}, r"got \(2, 3\) of torch.float32"),
    "listed positions": ({"position_ids": [[1, 2, 3]]}, "position_ids must be .* got a list"),
    "logits of a name": ({"logits_to_keep": "all"}, "logits_to_keep='all' must be a number"),
    "fewer than no logits": ({"logits_to_keep": -1}, "logits_to_keep=-1 must be a number"),
    "logits of no token": ({"logits_to_keep": torch.tensor([0, 3])}, "those among 3"),
}


@pytest.mark.parametrize("what", STEPS)
def test_a_step_that_cannot_be_is_refused(what: str) -> None:
    given, message = STEPS[what]
    gen, text = generator(), prompt(2, 5, (3, 0))
    past = gen.prefill(**text)
    *facts, tensors = all_of(past)
    for cache in (past, None):
        with pytest.raises(adaptc.AdaptcError, match=message):
            gen.forward(**{"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]]), "past_key_values": cache, **given})
    *now, same = all_of(past)
    assert now == facts
    assert all(map(torch.equal, tensors, same))


@pytest.mark.parametrize("ids", [torch.zeros(2, 0, dtype=torch.int64)])
def test_no_tokens_are_no_prompt(ids: Tensor) -> None:
    for call in (generator().prefill, lambda ids: generated(generator(), ids)):
        with pytest.raises(adaptc.AdaptcError, match="no tokens"):
            call(ids)


def test_a_step_that_raised_leaves_no_mask_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gen, text, new = generator(), prompt(2, 5), torch.tensor([[4, 5], [7, 8]])
    past = gen.prefill(**text)
    expected = gen.forward(new, past_key_values=past.copy()).logits

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(gen.program), "snapshot_call", lambda *args, **kwargs: fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            gen.forward(new, torch.tensor([[1] * 5 + [0, 0], [1] * 7]), past_key_values=past)
    assert past.length == 5
    torch.testing.assert_close(gen.forward(new, past_key_values=past).logits, expected)
