"""Generation in bfloat16: as near to float64 as PEFT's, and the same tokens wherever rounding leaves no choice."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from tests.generation.models import case, generated, prompt
from tests.generation.test_encoder_decoders import read, said
from tests.support.families import VOCAB
from tests.support.rounding import assert_no_less_accurate

HALF = torch.bfloat16
FAMILIES = ["qwen3", "gemma2", "mistral", "gpt2", "phi3", "t5", "whisper"]
ACROSS = ("t5", "whisper")


@cache
def both(family: str) -> tuple[Any, Any, Any]:
    """What generates, PEFT's model, and that in float64."""
    found = case(family)
    model, folder = copy.deepcopy(found.model).to(HALF), found.adapters["first"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    return adaptc.compile_for_generation(model, folder, max_length=48), oracle, copy.deepcopy(oracle).double()


def asked(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    given = read(family, 3, 9) if family in ACROSS else prompt(3, 9)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}


@torch.no_grad()
def logits(model: Any, family: str, given: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Of all tokens: what is generated, and of a decoder alone what stands before it."""
    return model(**given, decoder_input_ids=tokens).logits if family in ACROSS else model(input_ids=tokens).logits


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_near_to_float64_as_those_of_peft(family: str) -> None:
    """In steps of several sizes, past the windows of layers that have some."""
    gen, oracle, exact = both(family)
    given, best = asked(family, HALF), asked(family, torch.float64)
    tokens = torch.randint(4, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        past, found = gen.prefill(*given.values()) if family in ACROSS else gen.new_cache(), []
        for start, end in ((0, 5), (5, 6), (6, 11)):
            name = "decoder_input_ids" if family in ACROSS else "input_ids"
            found.append(gen.forward(**{name: tokens[:, start:end]}, past_key_values=past).logits)
    assert past.tensors[0].dtype == HALF
    theirs, right = logits(oracle, family, given, tokens), logits(exact, family, best, tokens)
    assert_no_less_accurate(torch.cat(found, 1), theirs, right, factor=1.25)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_peft_where_they_are_told_apart(family: str) -> None:
    gen, oracle, exact = both(family)
    given = asked(family, HALF)
    ours, theirs = (said(m, given) if family in ACROSS else generated(m, given) for m in (gen, oracle))
    length = min(ours.shape[1], theirs.shape[1])
    for row in range(3):
        differs = (ours[row, :length] != theirs[row, :length]).nonzero()
        if not len(differs):
            continue
        at = int(differs[0])
        one = {n: t[row : row + 1] for n, t in asked(family, torch.float64).items()}
        right = logits(exact, family, one, theirs[row : row + 1, :at])[0, -1]
        apart = abs(float(right[ours[row, at]] - right[theirs[row, at]]))
        assert apart <= 8 * torch.finfo(HALF).eps * float(right.abs().max())
