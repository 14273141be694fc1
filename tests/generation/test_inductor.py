"""Compiled steps: the same tokens, and one compilation for all lengths, batches, ranks and adapters."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

import adaptc
from adaptc.generation.modes import chunked_prefill
from tests.generation.models import case, generated, generator, prompt


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_one_step_is_compiled(family: str) -> None:
    found, gen = case(family), generator(family, "inductor")
    texts = [prompt(rows, length, seed=length) for rows, length in ((1, 1), (2, 3), (1, 20), (3, 2), (5, 8))]
    expected = {n: [found.expected(n, text) for text in texts] for n in ("first", "second")}
    generated(gen, prompt(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for name in ("second", "first"):
            adaptc.swap(gen, found.adapters[name])
            for text, want in zip(texts, expected[name], strict=True):
                assert torch.equal(generated(gen, text), want)
                assert torch.equal(
                    generated(gen, text, num_beams=2)[:, : text["input_ids"].shape[1]], text["input_ids"]
                )
            with patch.object(chunked_prefill, "CHUNK_SIZE", 4):
                assert torch.equal(generated(gen, texts[2]), expected[name][2])
        bound = gen.bind(found.adapters["second"])
        assert torch.equal(generated(bound, texts[1]), expected["second"][1])
