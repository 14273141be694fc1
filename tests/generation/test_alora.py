"""aLoRA in what generates: PEFT's answers token by token, and caches of the base that an adapter goes on from."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, TargetError
from adaptc.generation.modes import chunked_prefill
from adaptc.generation.modes.static_mode import StaticMode
from tests.generation.models import generated
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.invoked import alora_oracle, config_of, inputs_with_invocations
from tests.support.oracle import Oracle

CALL, OTHER = (5, 7), (6, 8, 9)


@cache
def oracle(family: str, tokens: tuple[int, ...] = CALL) -> Oracle:
    return alora_oracle(family, Path(mkdtemp()), tokens, seed=len(tokens))


@cache
def generator(family: str, backend: str = "eager") -> Any:
    """One that the tests of a process share: those that swap it give its adapter back."""
    model = FAMILIES[family].build()
    return adaptc.compile_for_generation(model, oracle(family).path, max_batch=12, max_length=48, backend=backend)


def text(batch: int, length: int, padding: str | None = "left", tokens: tuple[int, ...] = CALL) -> dict[str, Tensor]:
    inputs = inputs_with_invocations(tokens, batch, length, padding)
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("padding", ["left", None])
def test_what_peft_generates(family: str, padding: str | None) -> None:
    peft, gen, inputs = oracle(family).model, generator(family), text(4, 9, padding)
    got = generated(gen, inputs)
    assert torch.equal(got, generated(peft, inputs))
    with peft.disable_adapter():
        plain = generated(peft, inputs)
    assert [torch.equal(a, b) for a, b in zip(got, plain, strict=True)] == [False, False, True, True]
    assert torch.equal(generated(gen.base, inputs), plain)


@pytest.mark.long
@given(st.integers(1, 4), st.integers(1, 12), st.sampled_from([None, "left"]), st.sampled_from([None, 3]))
@settings(max_examples=examples(8))
def test_any_prompt(rows: int, length: int, padding: str | None, chunk: int | None) -> None:
    inputs = text(rows, length, padding)
    got = generated(generator("llama"), inputs, prefill_chunk_size=chunk)
    assert torch.equal(got, generated(oracle("llama").model, inputs))


@pytest.mark.parametrize("how", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3}, {}])
def test_rows_are_as_alone(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams and samples of a row are invoked as the row is; prompts in pieces, too. (PEFT has no beams.)"""
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 4)
    gen, inputs, count = generator("llama"), text(4, 9), how.get("num_return_sequences", 1)
    together = generated(gen, inputs, **how) if not how.get("do_sample") else None
    for row in range(4):
        alone = generated(gen, {n: t[row : row + 1] for n, t in inputs.items()}, **how)
        assert alone.shape[0] == count
        if together is not None:
            assert torch.equal(alone, together[row : row + 1])
    if not how:
        lookup = {n: t[:1, 2:] for n, t in inputs.items()}
        assert torch.equal(generated(gen, lookup, prompt_lookup_num_tokens=3), generated(gen, lookup))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_it_goes_on_from_a_cache_of_the_base(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that invoke it, in one call with what follows, cost themselves alone; begun in the cache or not."""
    gen, peft, inputs = generator(family), oracle(family).model, text(3, 14, None)
    inputs["input_ids"][:, :8] = inputs["input_ids"][:, :8].clamp(min=20)
    inputs["input_ids"][:, 8:10] = torch.tensor(CALL)
    said = gen.base.prefill(inputs["input_ids"][:, :8])
    before = said.copy()
    counted: list[int] = []
    original = StaticMode.run
    monkeypatch.setattr(StaticMode, "run", lambda *a: (counted.append(a[4]), original(*a))[1])
    expected = generated(peft, inputs)
    assert torch.equal(generated(gen, inputs, past_key_values=said.copy()), expected)
    assert counted == [6, *[1] * 8]
    new = {"input_ids": inputs["input_ids"][:, 8:], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generated(gen, new, past_key_values=said.copy()), expected[:, 8:])
    assert all(torch.equal(a, b) for a, b in zip(said.tensors, before.tensors, strict=True))
    # Where the cache has their first token, the others know of it. The second row is invoked once more.
    longer = gen.base.prefill(inputs["input_ids"][:, :9])
    generated(gen, inputs, past_key_values=longer)
    assert longer.active_from["alora_acts"].tolist() == [9, 12, 9]


def test_a_conversation_stays_adapted() -> None:
    """New tokens alone behind a cache in which it was invoked; PEFT is told since when."""
    gen, peft, inputs = generator("llama"), oracle("llama").model, text(2, 8, None)
    inputs["input_ids"][:, 4:6] = torch.tensor([CALL, (20, 21)])
    inputs["input_ids"][:, :4] = inputs["input_ids"][:, 6:] = 30
    past = gen.prefill(inputs["input_ids"])
    more = torch.tensor([[22, 23, 24]] * 2)
    whole = torch.cat([inputs["input_ids"], more], 1)
    expected = generated(peft, whole, alora_offsets=[7, None])
    new = {"input_ids": more, "attention_mask": torch.ones_like(whole)}
    assert torch.equal(generated(gen, new, past_key_values=past.copy()), expected[:, 8:])
    assert not torch.equal(expected, generated(peft, whole, alora_offsets=[None, None]))
    # Cut back to before it was invoked, the cache is the base's.
    past.crop(-5)
    other = {"input_ids": more, "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    with peft.disable_adapter():
        plain = generated(peft, torch.cat([whole[:, :3], more], 1))
    assert torch.equal(generated(gen, other, past_key_values=past), plain[:, 3:])


def test_steps_of_ones_own() -> None:
    gen, peft, inputs = generator("llama"), oracle("llama").model, text(3, 9, None)
    with torch.no_grad():
        expected = peft(**inputs).logits
    past, found = None, []
    for start, end in ((0, 7), (7, 9)):
        out = gen(inputs["input_ids"][:, start:end], past_key_values=past)
        past = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    assert past.active_from["alora_acts"].tolist()[:2] == [4, 7]
    past.batch_select_indices(torch.tensor([2, 0]))
    past.batch_repeat_interleave(2)
    assert past.copy().active_from["alora_acts"].tolist() == past.active_from["alora_acts"].tolist()
    on = [s < 9 for s in past.active_from["alora_acts"].tolist()]
    assert on == [False, False, True, True]


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_swaps_bind_and_files(backend: str, tmp_path: Path) -> None:
    gen, one, other = generator("llama", backend), oracle("llama"), oracle("llama", OTHER)
    first, second = text(3, 9), text(3, 7, tokens=OTHER)
    assert torch.equal(generated(gen, first), generated(one.model, first))
    with adaptc.debug.assert_no_recompiles():
        try:
            adaptc.swap(gen, other.path)
            bound = gen.bind(one.path)
            assert torch.equal(generated(gen, second), generated(other.model, second))
            assert torch.equal(generated(bound, first), generated(one.model, first))
        finally:
            adaptc.swap(gen, one.path)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "gen.pt2"))
    assert torch.equal(generated(loaded, first), generated(one.model, first))
    assert adaptc.verify(gen, FAMILIES["llama"].build()).ok
    with one.model.disable_adapter():
        assert torch.equal(generated(adaptc.unload(loaded), first), generated(one.model, first))


@pytest.mark.long
def test_refusals(tmp_path: Path) -> None:
    gen, config = generator("llama"), LoraConfig(**config_of("llama", CALL))
    with pytest.raises(ConfigError, match=r"give input_ids, or use gen.base"):
        gen.generate(inputs_embeds=torch.zeros(1, 3, gen.spec.hidden_size), max_new_tokens=2)
    plain = adaptc.compile_for_generation(FAMILIES["llama"].build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="a program that generates would be made with an adapter that acts"):
        plain.add_adapter("late", config, recompile=True)
    with pytest.raises(ConfigError, match="MambaForCausalLM would generate from a state with an adapter that acts"):
        adaptc.compile_for_generation(
            FAMILIES["mamba"].build(), config.replace(target_modules=["in_proj"]), max_length=20
        )
    with pytest.raises(ConfigError, match="has an encoder, and would generate with an adapter that acts"):
        adaptc.compile_for_generation(FAMILIES["t5"].build(), config.replace(target_modules=["q"]))
    with pytest.raises(TargetError, match="takes 'alora_acts' as an input, one for all its adapters"):
        adaptc.compile_for_generation(FAMILIES["llama"].build(), {"a": config, "b": copy.deepcopy(config)})
