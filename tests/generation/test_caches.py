"""Caches are the caller's: continued, forked, cut and reordered, they give what one generation from the start gives."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import wraps
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.generation.cache.cache_layout import cache_from_output
from adaptc.generation.spec import cache_argument_name
from tests.generation.models import case, generated, generator, prompt


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    whole=st.booleans(),
    seed=st.integers(0, 9),
)
def test_turns_of_a_conversation_are_one_text(
    lengths: list[int], padding: tuple[int, int], whole: bool, seed: int
) -> None:
    """Each turn adds tokens and what was generated; the next begins with all of them, or says with its mask that these
    are the new ones."""
    gen, new = generator(), 3
    text = prompt(2, 4, padding, seed)
    past = gen.new_cache()
    ids, mask = text["input_ids"], text["attention_mask"]
    for turn, n in enumerate(lengths):
        expected = generated(gen, {"input_ids": ids, "attention_mask": mask}, new=new)
        given_ids = ids if whole or not turn else ids[:, past.length :]
        out = generated(gen, {"input_ids": given_ids, "attention_mask": mask}, new=new, past_key_values=past)
        assert torch.equal(out[:, -new:], expected[:, -new:])
        added = prompt(2, n, seed=seed + turn)["input_ids"]
        ids = torch.cat([expected, added], 1)
        mask = torch.cat([mask, mask.new_ones(2, new + n)], 1)


def test_a_prefix_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each continuation goes on from a copy; the prefix is computed once."""
    gen = generator()
    prefix, ends = prompt(1, 8), [prompt(1, n, seed=n)["input_ids"] for n in (3, 5)]
    past = gen.prefill(**prefix)
    tokens = _count(gen, monkeypatch)
    expected = [generated(gen, torch.cat([prefix["input_ids"], end], 1)) for end in ends]
    tokens.clear()
    for end, want, fork in zip(ends, expected, (past.copy(), copy.deepcopy(past)), strict=True):
        ids = torch.cat([prefix["input_ids"], end], 1)
        assert torch.equal(generated(gen, ids, past_key_values=fork), want)
        assert tokens == [end.shape[1]] + [1] * 8
        tokens.clear()
    assert past.length == 8


def _count(gen: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step takes."""
    seen: list[int] = []
    kind, original = type(gen), type(gen).forward

    @wraps(original)
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.shape[1])
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return seen


def test_a_prompt_that_is_all_in_the_cache_is_continued() -> None:
    gen, text = generator(), prompt(3, 9, (4, 0, 1))
    assert torch.equal(generated(gen, text, past_key_values=gen.prefill(**text)), generated(gen, text))


def test_padding_is_remembered() -> None:
    """A cache of padded rows needs no mask to be continued."""
    gen, text = generator(), prompt(2, 7, (3, 0))
    more = torch.cat([text["input_ids"], prompt(2, 3, seed=4)["input_ids"]], 1)
    mask = torch.cat([text["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], 1)
    expected = generated(gen, {"input_ids": more, "attention_mask": mask})
    found = generated(gen, {"input_ids": more}, past_key_values=gen.prefill(**text))
    assert torch.equal(found, expected)


def test_one_cache_serves_what_is_bound_and_the_base() -> None:
    """Keys and values of one adapter go on under another, as PEFT's would."""
    gen, found = generator(), case("llama")
    text, other = prompt(1, 6), gen.bind(found.adapters["second"])
    oracle: Any = found.oracle
    for after, name in ((other, "second"), (gen.base, None)):
        past = gen.prefill(**text)
        ids = torch.cat([text["input_ids"], torch.tensor([[9, 5]])], 1)
        with torch.no_grad():
            oracle.set_adapter("first")
            theirs = cache_from_output(oracle(**text, use_cache=True))
        expected = found.expected(name, ids, **{cache_argument_name(): theirs})
        assert torch.equal(generated(after, ids, past_key_values=past), expected)


@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_rows_are_chosen(order: list[int]) -> None:
    gen, text = generator(), prompt(3, 5, (2, 0, 1))
    past = gen.prefill(**text)
    past.batch_select_indices(torch.tensor(order))
    rows = {k: torch.cat([v[order], torch.ones(len(order), 2, dtype=torch.int64) * 7], 1) for k, v in text.items()}
    rows["attention_mask"] = rows["attention_mask"].clamp(max=1)
    assert torch.equal(generated(gen, rows, past_key_values=past), generated(gen, rows))


def test_several_sequences_of_one_prefix() -> None:
    gen, text = generator(), prompt(1, 6)
    past = gen.prefill(**text)
    ids = torch.cat([text["input_ids"], torch.tensor([[9]])], 1)
    how = {"do_sample": True, "num_return_sequences": 3}
    with pytest.raises(adaptc.AdaptcError, match=r"1 rows and this generation 3: cache.batch_repeat_interleave"):
        generated(gen, ids, past_key_values=past, **how)
    past.batch_repeat_interleave(3)
    assert torch.equal(generated(gen, ids, past_key_values=past, **how), generated(gen, ids, **how))


@pytest.mark.long
def test_caches_take_what_a_call_needs_and_go_with_it() -> None:
    gen, text = generator(), prompt(2, 6)
    out = generated(gen, text, new=5, return_dict_in_generate=True)
    past = cache_from_output(out)
    assert past.length == 10  # the last token needs none
    assert past.allocated_length == 16  # which goes by eights
    assert past.nbytes == gen.spec.layout.nbytes(2, 16)
    gone = weakref.ref(past)
    del out, past
    gc.collect()
    assert gone() is None


def test_caches_grow() -> None:
    gen = generator()
    past = gen.prefill(prompt(1, 3)["input_ids"])
    past.expected_length = None
    text = prompt(1, 40)["input_ids"]
    assert torch.equal(
        generated(gen, text, past_key_values=gen.prefill(text[:, :3]), new=8), generated(gen, text, new=8)
    )
