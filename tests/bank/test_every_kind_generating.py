"""Promises of every bank that generates: what is of one generation stays with its prompts to the end."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.bank.kinds import ROWS, Kind, chosen, close, generating_kinds, kinds, of_bank, third_adapter
from tests.generation.models import prompt

BEAMS: dict[str, Any] = {"num_beams": 3}
ANSWERS: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2}
HOWS = [{}, BEAMS, ANSWERS, {"length": 1, "padding": ()}, {"length": 13, "padding": (3,)}]


@pytest.mark.long
@generating_kinds
@pytest.mark.parametrize(
    "how", [{}, BEAMS, ANSWERS, {"length": 1, "padding": ()}, {"length": 13, "padding": (3,)}], ids=str
)
def test_a_prompt_gets_what_it_gets_alone(kind: Kind, how: dict[str, Any]) -> None:
    """Whichever prompts and beams are beside it."""
    bank = kind.bank()
    found = kind.rows(bank, ROWS, new=9, **how)
    for i, name in enumerate(ROWS[:3]):
        own = slice(i, i + 1)
        # As a batch of one, whose padding is that of the batch.
        (expected,) = kind.alone(name, own, new=9, **how)
        assert torch.equal(found[i], expected), name
    (mix,) = kind.rows(bank, ROWS[3:], slice(3, 4), new=9, **how)
    assert torch.equal(found[3], mix)
    assert len({len(rows) for rows in found} | {how.get("num_return_sequences", 1)}) == 1


@pytest.mark.long
@generating_kinds
def test_samples_keep_the_adapter_of_their_prompt(kind: Kind) -> None:
    """With the random numbers that a batch of one adapter draws."""
    drawn: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "new": 5}
    found = kind.rows(kind.bank(), ["first", None, "second", "first"], **drawn)
    assert [len(samples) for samples in found] == [3] * 4
    close(found, chosen(kind, "first", None, "second", "first", **drawn))
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.long
@kinds("generate", "encoder-decoder", "virtual tokens")
def test_a_generation_keeps_the_adapters_that_it_began_with(kind: Kind) -> None:
    """What is replaced or removed while a text is generated is gone for the next one."""
    bank, (first, second), steps = kind.bank(), kind.adapters.values(), []
    # Virtual tokens are there or are not: no row has a part of them.
    names = ROWS if kind.way != "virtual tokens" else [*ROWS[:3], "first"]
    expected = kind.rows(bank, names, new=8)

    def changing(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(ids.shape[1])
        if len(steps) == 2:
            bank.replace("first", second)
            bank.remove("second")
            if kind.is_packaged:
                with pytest.raises(adaptc.ConfigError, match="that go on keep 2 that are gone"):
                    bank.add("third", first)
        return scores

    close(kind.rows(bank, names, new=8, logits_processor=[changing]), expected)
    assert len(steps) == 8
    assert list(bank) == ["first"]
    gc.collect()
    close(kind.rows(bank, ["first"] * 4), kind.alone("second"))
    bank.add("third", first)
    turned = {"first": "third", "second": "first"}
    now = [{turned[k]: w for k, w in n.items()} if isinstance(n, dict) else n and turned[n] for n in names]
    close(kind.rows(bank, now, new=8), expected)
    different = kind.rows(bank, [n and "first" for n in names], new=8)
    assert not all(torch.equal(a, b) for a, b in zip(different, expected, strict=True))


@pytest.mark.long
@generating_kinds
def test_what_was_read_with_adapters_is_continued(kind: Kind) -> None:
    """Of a text a part is read before; of what an encoder reads all of it, for beams too."""
    bank = kind.bank()
    bank.add("third", third_adapter(kind))
    encodes = kind.way == "encoder-decoder"
    names: list[Any] = ["third", None, {"third": 0.4, "first": 0.8}, "second"]

    def continued(input_ids: Tensor, attention_mask: Tensor, **how: Any) -> Any:
        end = None if encodes else 4
        past = bank.prefill(input_ids[:, :end], attention_mask[:, :end], adapters=names)
        read = {} if encodes else {"input_ids": input_ids, "attention_mask": attention_mask}
        return of_bank(bank, names, {**read, "past_key_values": past, **how})

    for how in ({}, BEAMS, ANSWERS) if encodes else ({},):
        expected = kind.rows(bank, names, new=9, **how)
        assert all(map(torch.equal, kind.run(continued, new=9, **how), expected))
        others = kind.rows(bank, [None] * 4, new=9, **how)
        assert not all(map(torch.equal, expected, others))


@pytest.mark.long
@generating_kinds
def test_prompts_are_refused_by_name(kind: Kind) -> None:
    bank, given = kind.bank(), prompt(4, 6)
    for rows in (["first"], ["first", "second"], [None] * 5):
        for call in (bank.prefill, bank.generate):
            with pytest.raises(adaptc.AdaptcError, match=f"{len(rows)} entries, and there are 4 prompts"):
                call(given["input_ids"], attention_mask=given["attention_mask"], adapters=rows)
    for call in (bank.prefill, bank.generate):
        with pytest.raises(adaptc.AdaptcError, match="adapters= is missing"):
            call(given["input_ids"])
    with pytest.raises(adaptc.ConfigError, match="give a row a weight"):
        kind.rows(bank, ROWS, adapter_scale=0.5)


@pytest.mark.long
@kinds("encoder-decoder")
def test_what_was_encoded_counts_the_prompts(kind: Kind) -> None:
    bank, given = kind.bank(), prompt(4, 6)
    states = kind.source.get_encoder()(**given)
    past = bank.prefill(given["input_ids"], given["attention_mask"], adapters=ROWS)
    for read in ({"past_key_values": past}, {"cache": past}, {"encoder_outputs": states}):
        for rows in (["first"], ["first", "second"], [None] * 8):
            with pytest.raises(adaptc.AdaptcError, match=f"{len(rows)} entries, and there are 4 prompts"):
                bank.generate(**read, adapters=rows, max_new_tokens=2)


@pytest.mark.long
@kinds("encoder-decoder")
def test_a_bank_with_an_encoder_is_called_part_by_part(kind: Kind) -> None:
    bank = kind.bank()
    with pytest.raises(adaptc.AdaptcError, match="part by part"):
        bank(**prompt(4, 6), adapters=ROWS)
    with pytest.raises(adaptc.AdaptcError, match=r"no one exported program is|there is no exported program"):
        bank.exported()
    if not kind.is_packaged:
        with pytest.raises(adaptc.AdaptcError, match="part by part"):
            bank.select(ROWS).runner()
