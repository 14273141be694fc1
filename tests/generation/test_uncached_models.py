"""Models that are captured with a cache that ends with each step, or with none: the same tokens, and it is told."""

from __future__ import annotations

import copy
import warnings
from functools import cache, wraps
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc.generation.modes import chunked_prefill
from tests.generation.models import Case, case, generated, generator, prompt
from tests.generation.packaged import packaged
from tests.support.families import VOCAB, perturb

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "looked up": {"prompt_lookup_num_tokens": 3},
}


@cache
def first_gpt() -> Case:
    """GPT as it was first, whose forward knows no cache."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval()
        perturb(model)
        config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
        oracle: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="first")
    return Case(model, oracle.eval(), {})


@cache
def whole() -> Any:
    """A generator of it, with its warning."""
    found = first_gpt()
    with pytest.warns(adaptc.AdaptcWarning, match="generates without a cache.*no cache of keys and values") as told:
        gen = adaptc.compile_for_generation(found.model, found.oracle.peft_config["first"], max_batch=12)
    assert len(told) == 1
    tensors = peft.get_peft_model_state_dict(found.oracle, adapter_name="first")
    adaptc.swap(gen, {n: t.clone() for n, t in tensors.items()}, config=found.oracle.peft_config["first"])
    return gen


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_peft(way: str) -> None:
    text = prompt(1, 7) if way == "looked up" else prompt(3, 9, (4, 0, 1))
    expected = generated(first_gpt().oracle, text, **({} if way == "looked up" else WAYS[way]))
    assert torch.equal(generated(whole(), text, **WAYS[way]), expected)
    if way != "looked up":
        assert torch.equal(generated(whole(), text, **WAYS[way], use_cache=False), expected)
        assert not torch.equal(generated(whole().base, text, **WAYS[way]), expected)


@pytest.mark.long
def test_it_is_told() -> None:
    report = adaptc.report(whole())
    assert list(report.notes) == report.to_dict()["notes"]
    assert "no cache, so each token computes the whole text: OpenAIGPTLMHeadModel gives no cache" in str(report)
    assert "cache: 2 layers, 256 B for each row and position" in str(adaptc.report(generator()))
    told = str(adaptc.report(generator("gpt_neo")))
    assert "of which a step sees those up to its end alone: GPTNeoForCausalLM cannot be captured as a step" in told


@pytest.mark.long
def test_what_goes_on_from_a_cache_goes_on_from_the_text(tmp_path: Path) -> None:
    """Prefixes, forks, conversations, files, and the limits of a cache."""
    gen, text = whole(), prompt(2, 9, (3, 0))
    alone = generated(gen, text)
    start = gen.prefill(text["input_ids"][:, :5], text["attention_mask"][:, :5])
    for _ in range(2):
        assert torch.equal(generated(gen, text, past_key_values=start.copy()), alone)
    assert start.length == 5
    written = adaptc.load(adaptc.save(gen, tmp_path / "whole.pt2"))
    assert torch.equal(generated(written, text), alone)
    assert adaptc.report(written).notes == adaptc.report(gen).notes
    for model in (None, first_gpt().model):
        assert adaptc.verify(gen, model).ok
    with pytest.raises(adaptc.AdaptcError, match="inputs_embeds is not taken: a step takes tokens alone"):
        gen.generate(inputs_embeds=torch.zeros(1, 3, 24))
    with pytest.raises(adaptc.AdaptcError, match="more than max_length=63"):
        generated(gen, text, new=56)
    assert generated(gen, text, new=55).shape == (2, 64)  # all that the model has positions for


@pytest.mark.long
def test_caches_that_end_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, with more room than is filled, forked and cut."""
    gen, found, text = generator("gpt_neo"), case("gpt_neo"), prompt(2, 9, (3, 0))
    alone = found.expected("first", text)
    start = gen.prefill(text["input_ids"][:, :5], text["attention_mask"][:, :5])
    assert start.allocated_length > 5
    assert torch.equal(generated(gen, text, past_key_values=start.copy()), alone)
    assert torch.equal(generated(gen, prompt(1, 7), prompt_lookup_num_tokens=3), found.expected("first", prompt(1, 7)))
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 4)
    assert torch.equal(generated(gen, text), alone)
    assert adaptc.verify(gen, found.model).ok
    whole_text = adaptc.compile_for_generation(found.model, found.adapters["first"], max_length=63)
    assert generated(whole_text, text, new=55).shape == (2, 64)


@pytest.mark.slow
def test_as_a_package() -> None:
    found, package = case("gpt_neo"), packaged("gpt_neo")
    for text in (prompt(3, 9, (4, 0, 1)), prompt(1, 1)):
        assert torch.equal(generated(package, text), found.expected("first", text))
    assert adaptc.verify(package, generator("gpt_neo")).ok
    assert "sees those up to its end alone" in str(adaptc.report(package))


class Forgetful(transformers.LlamaForCausalLM):
    """Goes on from a cache in another way than from the text itself."""

    @wraps(transformers.LlamaForCausalLM.forward)
    def forward(self, *args: Any, use_cache: bool | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, use_cache=use_cache, **kwargs)
        if use_cache:
            out.logits = out.logits.flip(-1)
        return out


@pytest.mark.long
def test_a_model_that_says_something_else_with_a_cache_is_given_the_text() -> None:
    model, text = Forgetful(case("llama").model.config).eval(), prompt(2, 6, (2, 0))
    with pytest.warns(adaptc.AdaptcWarning, match="does not say with a cache of fixed room what it says itself"):
        gen = adaptc.compile_for_generation(model, adaptc.LoraConfig(target_modules="all-linear"))
    assert torch.equal(generated(gen, text), generated(model, text, use_cache=False))


class Fickle(Forgetful):
    """Says something else of long texts."""

    @wraps(transformers.LlamaForCausalLM.forward)
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, **kwargs)
        if not torch.compiler.is_exporting():
            out.logits = out.logits.roll(1, -1)
        return out


@pytest.mark.long
def test_a_model_that_no_step_is_like_is_refused() -> None:
    model = Fickle(case("llama").model.config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(adaptc.CaptureError, match=r"fixed room what.* Nor without a cache: .*of other lengths"):
            adaptc.compile_for_generation(model, adaptc.LoraConfig(target_modules="all-linear"))
    assert "forward" not in vars(model)
