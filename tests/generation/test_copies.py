"""Copies of what generates, and what is no copy: each is swapped and filled by itself, and nothing is pickled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.generation.test_bank import NAMES, bank

TEXT = prompt(4, 6, (0, 2))


@pytest.mark.few(2)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_copy_is_swapped_by_itself(how: Any, family: str) -> None:
    gen, dirs = generator(family), case(family).adapters
    first, second = generated(gen, TEXT), generated(gen.bind(dirs["second"]), TEXT)
    assert not torch.equal(first, second)
    other = how(gen)
    assert torch.equal(generated(other, TEXT), first)
    adaptc.swap(other, dirs["second"])
    assert torch.equal(generated(other, TEXT), second)
    assert torch.equal(generated(gen, TEXT), first)
    assert torch.equal(generated(how(gen.bind(dirs["second"])), TEXT), second)


def test_caches_are_of_a_copy_that_shares_the_weights() -> None:
    gen = generator()
    past = gen.prefill(**TEXT)
    assert torch.equal(generated(copy.copy(gen), TEXT, past_key_values=past.copy()), generated(gen, TEXT))
    with pytest.raises(adaptc.AdaptcError, match="this cache is of another program"):
        generated(copy.deepcopy(gen), TEXT, past_key_values=past)


def test_nothing_is_pickled() -> None:
    gen, made = generator(), bank()
    for one in (gen, gen.base, generator("t5"), made.select(NAMES)):
        with pytest.raises(adaptc.AdaptcError, match=r"cannot be pickled: .*adaptc\.save.*copy\.deepcopy"):
            pickle.dumps(one)
    with pytest.raises(adaptc.AdaptcError, match="a bank cannot be pickled"):
        pickle.dumps(made)
    for past in (gen.prefill(**TEXT), generator("t5").prefill(TEXT["input_ids"])):
        with pytest.raises(adaptc.AdaptcError, match=r"a cache cannot be pickled.*gen\.prefill"):
            torch.save(past, io.BytesIO())
