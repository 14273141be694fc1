"""Layers that look back on a window keep it alone: the bytes of transformers' static cache, and the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc.generation.cache import sliding_window
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.step_cache import StepCache, as_transformers_cache
from adaptc.generation.modes.all_modes import SLIDING_WINDOW, STATIC
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import packaged
from tests.support.families import FAMILIES, VOCAB

#: one that has layers of both kinds
FAMILY = "gemma2"
WINDOW_OF_IT = 6


def static_bytes(config: Any, rows: int, positions: int) -> int:
    """Of transformers' static cache."""
    cache = transformers.StaticCache(config=config, max_cache_len=positions)
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache.early_initialization(rows, heads, dim, torch.float32, torch.device("cpu"))
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("positions", [5, 16, 48])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "phi3", "gpt2", "cohere"])
def test_bytes_are_those_of_the_static_cache(family: str, positions: int) -> None:
    model = FAMILIES[family].build()
    layout = CacheLayout.from_model(model)
    made = as_transformers_cache(StepCache)(layout, None, 64, torch.device("cpu"), layout.sliding_window)
    made.expected_length = positions
    made.reserve(3, positions)
    most = -(-positions // 8) * 8  # rooms are of whole eights
    assert static_bytes(model.config, 3, positions) <= made.nbytes <= static_bytes(model.config, 3, most)
    assert made.nbytes == layout.nbytes(
        3, most, None if layout.sliding_window is None else min(layout.sliding_window, most)
    )


@pytest.mark.long
@pytest.mark.parametrize("family", ["mistral", FAMILY])
def test_a_generation_holds_no_more(family: str) -> None:
    """After a prompt longer than the window, and at the end."""
    gen, text = generator(family), prompt(3, 9, (4, 0, 1))
    assert gen.spec.cache_mode == SLIDING_WINDOW
    cache = gen.prefill(text["input_ids"], text["attention_mask"])
    for _ in range(2):
        assert cache.ring_length == WINDOW_OF_IT
        assert cache.nbytes <= static_bytes(case(family).model.config, 3, cache.allocated_length)
        assert torch.equal(generated(gen, text, past_key_values=cache.copy()), case(family).expected("first", text))
        generated(gen, text, past_key_values=cache, new=1)


@settings(max_examples=25)
@given(
    pieces=st.lists(st.integers(1, 13), min_size=1, max_size=6),
    back=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    kept=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pieces_and_steps_back_are_one_text(pieces: list[int], back: list[int], kept: bool, seed: int) -> None:
    """Of any sizes: rings grow for a piece and shrink after it; what is taken back is computed again, or refused."""
    gen = generator(FAMILY)
    draw = torch.Generator().manual_seed(seed)
    cache, text = gen.new_cache(), torch.zeros(2, 0, dtype=torch.int64)
    if kept:
        cache.activate_past_recording()
    for tokens, steps in zip(pieces, back, strict=False):
        tokens = min(tokens, gen.spec.max_length - cache.length)
        if tokens == 0:
            break
        text = torch.cat([text, torch.randint(4, VOCAB, (2, tokens), generator=draw)], 1)
        found = gen.forward(text[:, cache.length :], past_key_values=cache).logits
        case(FAMILY).oracle.set_adapter("first")
        expected = case(FAMILY).oracle(input_ids=text, use_cache=False).logits[:, -tokens:]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        left = max(0, cache.length - steps)
        if kept or cache.can_crop(left):
            cache.crop(left - cache.length)
            text = text[:, :left]
        else:
            before = cache.length
            with pytest.raises(adaptc.AdaptcError, match=f"layers that look back on {WINDOW_OF_IT} keep those from"):
                cache.crop(left - before)
            assert cache.length == before
    assert (cache.ring_length or 0) <= (cache.allocated_length if kept else WINDOW_OF_IT)


def test_what_single_steps_write_over_is_lost() -> None:
    """No ring is packed anew in between; what is taken back by one is computed again."""
    gen, text = generator(FAMILY), prompt(2, 14)["input_ids"]
    cache = gen.prefill(text[:, :9])
    for i in range(9, 13):
        gen.forward(text[:, i : i + 1], past_key_values=cache)
    assert (cache.ring_length, cache.ring_start) == (WINDOW_OF_IT, 13 - WINDOW_OF_IT)
    with pytest.raises(adaptc.AdaptcError, match="keep those from 7 on"):
        cache.crop(-2)
    cache.crop(-1)
    found = gen.forward(text[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(found, gen.forward(text).logits[:, 12:], rtol=1e-3, atol=1e-3)


def test_guesses_are_taken_back() -> None:
    """Assisted decoding takes several tokens back at a time, of its own cache and of one that was there before."""
    gen, found, text = generator(FAMILY), case(FAMILY), prompt(1, 21)
    expected = found.expected("first", text)
    assert torch.equal(generated(gen, text, prompt_lookup_num_tokens=4), expected)
    assert torch.equal(generated(gen, text, assistant_model=gen.base), expected)
    start = gen.prefill(text["input_ids"][:, :15])
    assert torch.equal(generated(gen, text, past_key_values=start, prompt_lookup_num_tokens=4), expected)


@pytest.mark.long
def test_a_model_whose_masks_are_made_otherwise_keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **how: Any) -> Any:
        raise adaptc.CaptureError("no such mask")

    monkeypatch.setattr(sliding_window.RingMasks, "__call__", refuses)
    found, text = case("mistral"), prompt(2, 9, (3, 0))
    gen = adaptc.compile_for_generation(found.model, found.adapters["first"], max_length=48)
    assert (gen.spec.cache_mode, gen.spec.layout.sliding_window) == (STATIC, WINDOW_OF_IT)
    assert torch.equal(generated(gen, text), found.expected("first", text))
    assert "those that look back on a window among them: MistralForCausalLM cannot" in str(adaptc.report(gen))


@pytest.mark.long
def test_files_know_of_rings(tmp_path: Path) -> None:
    gen, text = generator(FAMILY), prompt(2, 9, (3, 0))
    again = adaptc.load(adaptc.save(gen, tmp_path / "rings.pt2"))
    assert again.spec.cache_mode == SLIDING_WINDOW
    assert again.prefill(text["input_ids"]).ring_length == WINDOW_OF_IT
    assert torch.equal(generated(again, text), case(FAMILY).expected("first", text))
    assert adaptc.verify(gen, case(FAMILY).model).ok
    assert "at most 768 B for each row in layers that keep the last 6" in str(adaptc.report(gen))


@pytest.mark.slow
def test_as_a_package() -> None:
    package, found = packaged(FAMILY), case(FAMILY)
    for text in (prompt(3, 9, (4, 0, 1)), prompt(1, 21), prompt(2, 1)):
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(generated(package, text, **how), found.expected("first", text, **how))
    assert adaptc.verify(package, generator(FAMILY)).ok


@pytest.mark.slow
def test_inductor_compiles_once_for_all_sizes() -> None:
    gen, found = generator(FAMILY, "inductor"), case(FAMILY)
    generated(gen, prompt(2, 7))
    with adaptc.debug.assert_no_recompiles():
        for text in (prompt(3, 9, (4, 0, 1)), prompt(1, 21), prompt(2, 2)):
            assert torch.equal(generated(gen, text), found.expected("first", text))
