"""Long prompts in pieces: the same logits and the same cache, with less attention."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.generation.modes import chunked_prefill
from tests.generation.models import generator, prompt


@pytest.mark.long
@given(length=st.integers(1, 23), before=st.integers(0, 5), keep=st.integers(0, 6), embeds=st.booleans())
def test_pieces_are_one_prompt(length: int, before: int, keep: int, embeds: bool) -> None:
    gen = generator("gemma3_text")
    text = prompt(2, before + length, (min(2, before + length - 1), 0))
    ids, mask = text["input_ids"], text["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    new: dict[str, Any] = {"input_ids": ids[:, before:]}
    if embeds:
        draw = torch.Generator().manual_seed(length)
        new = {"inputs_embeds": torch.randn(2, length, gen.spec.hidden_size, generator=draw)}

    def run() -> tuple[torch.Tensor, Any, int]:
        past = gen.new_cache()
        if before:
            gen.forward(ids[:, :before], mask[:, :before], positions[:, :before], past)
        out = gen.forward(
            **new,
            attention_mask=mask,
            position_ids=positions[:, before:],
            past_key_values=past,
            logits_to_keep=keep,
        )
        return out.logits, past, past.length

    logits, whole, filled = run()
    with (
        patch.object(chunked_prefill, "CHUNK_SIZE", 4),
        patch.object(chunked_prefill, "_call_step", wraps=chunked_prefill._call_step) as call,
    ):
        found = run()
    assert (call.call_count > 1 + bool(before)) == (length > 4 and 0 < keep <= 4)
    seen = mask[:, before:].bool()[:, -keep:] if keep else mask[:, before:].bool()
    torch.testing.assert_close(found[0][seen], logits[seen], rtol=1e-4, atol=1e-5)
    kept = torch.arange(max(whole.ring_start, found[1].ring_start), filled)
    assert len(kept) == min(filled, gen.spec.layout.sliding_window)
    valid = mask.bool()[:, kept]
    for a, b in zip(found[1].tensors, whole.tensors, strict=True):
        a, b = (t[:, :, kept % t.shape[2]].transpose(1, 2)[valid] for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert found[2] == filled == before + length
