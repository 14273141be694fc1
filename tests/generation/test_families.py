"""The same tokens as transformers' generate on a PEFT model, for each family of causal models."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.support.families import FAMILIES

#: but for mamba, which has tests of its own (test_recurrent_models.py)
CAUSAL = [name for name, family in FAMILIES.items() if family.kind == "causal" and name != "mamba"]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", CAUSAL)
def test_tokens_are_those_of_peft(family: str) -> None:
    """Rows of different lengths, longer than the windows of layers that have some; greedy, drawn, in beams, and of what
    the adapter is swapped to."""
    found, gen = case(family), generator(family)
    padded = prompt(3, 9, (4, 0, 1))
    for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
        assert torch.equal(generated(gen, padded, **how), found.expected("first", padded, **how))
    try:
        adaptc.swap(gen, found.adapters["second"])
        single = prompt(1, 11)
        assert torch.equal(generated(gen, single), found.expected("second", single))
    finally:
        adaptc.swap(gen, found.adapters["first"])
    assert torch.equal(generated(gen.base, single), found.expected(None, single))
    first, base = (g.forward(single["input_ids"]).logits for g in (gen, gen.base))
    assert (first - base).abs().max() > 1e-2
