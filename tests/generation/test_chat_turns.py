"""Turns of a conversation without a mask: what is padding follows from the tokens, and from what the cache knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from adaptc.generation.spec import cache_argument_name
from tests.generation.models import case, generated, generator, prompt
from tests.generation.test_bank_virtual_tokens import ROWS, bank
from tests.generation.test_virtual_tokens import generator as prompted
from tests.support.families import FAMILIES
from tests.support.prompts import text

#: full attention, a window
NAMES = ["llama", "gemma2"]


def longer(ids: Tensor, count: int = 2) -> Tensor:
    return torch.cat([ids, prompt(len(ids), count, seed=3)["input_ids"]], 1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("padding", [(), (2, 0, 1)], ids=["even", "padded"])
def test_rows_that_ended_are_not_seen_further(family: str, padding: tuple[int, ...]) -> None:
    """A row that ends before the others is filled up, and the next turn sees nothing of that, as with PEFT."""
    gen, found, inputs = generator(family), case(family), prompt(3, 7, padding)
    ends = int(found.expected("first", inputs)[0, 8])
    ours, theirs = gen.new_cache(), transformers.DynamicCache(config=found.model.config)
    for turn in range(3):
        how: dict[str, Any] = {"new": 5, "eos_token_id": ends}
        out = generated(gen, inputs, past_key_values=ours, **how)
        assert torch.equal(out, found.expected("first", inputs, **how, **{cache_argument_name(): theirs}))
        if turn == 0:
            assert (out[0, -3:] == 0).all()
            assert not (out[:, -3:] == 0).all()
        inputs = {"input_ids": longer(out)}


@pytest.mark.parametrize("family", NAMES)
def test_a_padded_prefix_has_several_rows_of_each(family: str) -> None:
    gen, inputs = generator(family), prompt(3, 6, (2, 0, 1))
    past = gen.prefill(**inputs)
    past.batch_repeat_interleave(2)
    ids, mask = longer(inputs["input_ids"]), torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    for how in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        expected = generated(gen, {"input_ids": ids, "attention_mask": mask}, **how)
        assert torch.equal(generated(gen, {"input_ids": ids}, past_key_values=past.copy(), **how), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_a_prefix_behind_tokens_of_several_adapters_has_several_rows_of_each(masked: bool) -> None:
    made, inputs = bank(), text(4, 8, "left")
    ids, mask = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0), inputs["attention_mask"]
    given = {"input_ids": ids, "attention_mask": mask if masked else None}
    expected = generated(made.select(ROWS), {"input_ids": ids, "attention_mask": mask}, num_beams=2)
    past = made.prefill(ids[:, :5], mask[:, :5], adapters=ROWS)
    past.batch_repeat_interleave(2)
    assert torch.equal(generated(made.select(ROWS), given, past_key_values=past, num_beams=2), expected)


@pytest.mark.long
def test_padding_is_found_with_a_config_that_leaves_it_to_the_model() -> None:
    """Behind tokens of an adapter's, too."""
    short = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    for gen in (
        prompted("llama"),
        adaptc.compile_for_generation(FAMILIES["llama"].build(), case("llama").adapters["first"]),
    ):
        inputs, before = prompt(3, 6, (2, 0, 1)), gen.generation_config
        gen.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=60)
        try:
            expected = gen.generate(**inputs, generation_config=short)
            assert torch.equal(gen.generate(inputs["input_ids"], generation_config=short), expected)
        finally:
            gen.generation_config = before


def test_rows_that_are_no_multiple_are_refused() -> None:
    gen = generator()
    past = gen.prefill(**prompt(3, 6, (2, 0, 1)))
    with pytest.raises(adaptc.AdaptcError, match="3 rows and this generation 2: give a prompt for each"):
        generated(gen, {"input_ids": longer(prompt(2, 6)["input_ids"])}, past_key_values=past)
    assert past.length == 6
