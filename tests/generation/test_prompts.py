"""Any prompts: rows, lengths, paddings and numbers of tokens, for models with windows of six positions and without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.support.families import FAMILIES


@st.composite
def prompts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 17))
    padding = draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows))
    # transformers wants one row at least that is as long as the batch.
    padding[draw(st.integers(0, rows - 1))] = 0
    return prompt(rows, length, tuple(padding), seed=draw(st.integers(0, 99)))


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@given(
    text=prompts(),
    new=st.integers(1, 12),
    adapter=st.sampled_from(["first", "second"]),
    how=st.sampled_from([{}, {"do_sample": True}, {"num_beams": 2}]),
)
def test_tokens_are_those_of_peft(
    family: str, text: dict[str, torch.Tensor], new: int, adapter: str, how: dict[str, object]
) -> None:
    found, gen = case(family), generator(family)
    try:
        adaptc.swap(gen, found.adapters[adapter])
        assert torch.equal(generated(gen, text, new=new, **how), found.expected(adapter, text, new=new, **how))
    finally:
        adaptc.swap(gen, found.adapters["first"])


@pytest.mark.long
def test_padding_is_counted_where_the_model_s_own_generation_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exaone 4.5 leaves position_ids out of its steps, so each token's is its place in the cache."""
    model = FAMILIES["llama"].build().eval()
    own = model.prepare_inputs_for_generation

    def prepare(*args: object, **kwargs: object) -> dict[str, object]:
        return own(*args, **kwargs) | {"position_ids": None}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare)
    config = adaptc.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    gen, text = adaptc.compile_for_generation(model, config, max_length=48), prompt(3, 9, (0, 4, 2))
    assert gen.spec.counts_padding
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**text, **options)
    assert torch.equal(gen.base.generate(**text, **options), want)
    past = gen.base.prefill(**text)
    assert torch.equal(gen.base.generate(**text, **options, cache=past), want)
    plain = adaptc.compile_for_generation(FAMILIES["llama"].build(), config, max_length=48)
    assert not plain.spec.counts_padding
    assert plain.spec.first_position == 0


def test_positions_begin_where_the_model_s_own_generation_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """PaliGemma's first position is 1."""
    model = FAMILIES["gpt2"].build().eval()
    own = model.prepare_inputs_for_generation

    def prepare(*args: object, **kwargs: object) -> dict[str, object]:
        made = own(*args, **kwargs)
        return made | {"position_ids": made["position_ids"] + 2}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare)
    config = adaptc.LoraConfig(r=2, target_modules=["c_attn"])
    gen, text = adaptc.compile_for_generation(model, config, max_length=40), prompt(3, 9, (0, 4, 2))
    assert gen.spec.first_position == 2
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**text, **options)
    assert torch.equal(gen.base.generate(**text, **options), want)
    past = gen.base.prefill(**text)
    assert torch.equal(gen.base.generate(**text, **options, cache=past), want)
    ids = text["input_ids"]
    with torch.no_grad():
        found, logits = gen.base(ids).logits, model(ids, position_ids=torch.arange(2, 2 + ids.shape[1])[None]).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
