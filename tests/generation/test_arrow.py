"""Arrow in what generates: PEFT's answers token by token, with adapters swapped and rows on adapters of their own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import adaptc
from adaptc import ArrowConfig
from tests.generation.models import generated
from tests.support.arrow import peft_model, save_random_lora
from tests.support.families import FAMILIES


@cache
def directory(family: str, seed: int) -> Path:
    return save_random_lora(family, Path(mkdtemp()), seed, lora_alpha=4 + seed)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_peft_generates(family: str) -> None:
    paths, others = [directory(family, s) for s in range(3)], [directory(family, s) for s in (4, 1)]
    first, second = (adaptc.methods.arrow_adapter(p, ArrowConfig(k)) for p, k in ((paths, 2), (others, 1)))
    gen: Any = adaptc.compile_for_generation(FAMILIES[family].build(), first, max_batch=4, max_length=32)
    ids = FAMILIES[family].inputs(3, 7)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = [generated(peft_model(family, p, top_k=k), inputs) for p, k in ((paths, 2), (others, 1))]
    assert not torch.equal(*expected)
    assert torch.equal(generated(gen, inputs), expected[0])
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(gen, second)
        assert torch.equal(generated(gen, inputs), expected[1])
        assert torch.equal(generated(gen.bind(first), inputs), expected[0])
    rows = gen.bank({"first": first, "second": second})
    mixed = generated(rows, inputs, adapters=["first", "second", "first"])
    assert torch.equal(mixed, torch.stack([expected[i][row] for row, i in enumerate((0, 1, 0))]))
