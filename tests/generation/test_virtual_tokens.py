"""Generation behind virtual tokens: PEFT's own generate says which tokens come next."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc import CPTConfig, LoraConfig, MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig
from adaptc.errors import AdaptcError, ConfigError, MergeError
from adaptc.generation.spec import cache_argument_name
from tests.generation.models import generated
from tests.generation.test_prefixes import continued
from tests.generation.test_uncached_models import first_gpt
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.oracle import file_tensors, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, generate_with_peft, prompt_oracle, text

#: absolute positions, rings in some layers, grouped queries, states
NAMES = ["gpt2", "gemma3_text", "llama"]
HOWS = [{}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
METHODS = {
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "encoder_hidden_size": 13},
    "CPTConfig": {"cpt_token_ids": [5, 7, 9], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
}
TASKS = {"num_tasks": 3, "num_ranks": 2}


@cache
def generator(name):
    """One for all tests, which may swap it."""
    config = PromptTuningConfig(num_virtual_tokens=3)
    return adaptc.compile_for_generation(FAMILIES[name].build(), config, max_batch=12, max_length=60)


@cache
def oracle(name, count):
    from pathlib import Path
    from tempfile import mkdtemp

    return prompt_oracle(name, Path(mkdtemp()), num_virtual_tokens=count, seed=count)


def said(gen, inputs, new=7, **how):
    return generated(gen, inputs, new=new, **how)


def peft_said(model, inputs, new=7, **how):
    return generate_with_peft(model, **inputs, max_new_tokens=new, **{**OPTIONS, **how})


@pytest.mark.long
@settings(max_examples=examples(12))
@given(
    name=st.sampled_from(NAMES),
    count=st.sampled_from([1, 2, 7, 13]),
    batch=st.integers(1, 4),
    length=st.integers(1, 11),
    padding=st.sampled_from(["left", None]),
    new=st.integers(1, 9),
    how=st.sampled_from(HOWS),
)
def test_tokens_are_those_of_peft(name, count, batch, length, padding, new, how):
    """One program for any number of them; some are more than windows hold."""
    gen, theirs, inputs = generator(name), oracle(name, count), text(batch, length, padding)
    adaptc.swap(gen, theirs.path)
    assert torch.equal(said(gen, inputs, new, **how), peft_said(theirs.model, inputs, new, **how))


@pytest.mark.long
def test_swaps_and_bindings():
    """Nothing is compiled again, what is bound keeps its tokens, and so does a generation that has begun."""
    gen, inputs = generator("llama"), text(2, 5, "left")
    expected = {n: peft_said(oracle("llama", n).model, inputs) for n in (2, 7)}
    assert not torch.equal(*expected.values())
    plain = generated(FAMILIES["llama"].build(), inputs, new=7)
    said(gen, inputs)
    with adaptc.debug.assert_no_recompiles():
        for n, tokens in expected.items():
            adaptc.swap(gen, oracle("llama", n).path)
            assert torch.equal(said(gen, inputs), tokens)
            assert torch.equal(said(gen.base, inputs), plain)
            assert torch.equal(said(gen.bind(None), inputs), plain)
        bound = gen.bind(oracle("llama", 2).path)
        assert torch.equal(said(bound, inputs), expected[2])

    class Swapper(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            adaptc.swap(gen, oracle("llama", 2).path)

        def end(self):
            pass

    one = text(1, 5, None)
    assert torch.equal(said(gen, one, streamer=Swapper()), peft_said(oracle("llama", 7).model, one))
    assert torch.equal(said(gen, one), peft_said(oracle("llama", 2).model, one))


@pytest.mark.long
def test_what_is_written_to_is_read_again():
    """The tokens in front follow weights of the base that are trained on."""
    model = FAMILIES["llama"].build()
    gen = adaptc.compile_for_generation(model, oracle("llama", 7).path, max_length=40)
    inputs = text(2, 5, None)
    before = gen.new_cache().prefix.tensors
    assert gen.new_cache().prefix.tensors is before
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    again = adaptc.compile_for_generation(model, oracle("llama", 7).path, max_length=40)
    torch.testing.assert_close(gen.prefill(**inputs).tensors, again.prefill(**inputs).tensors)
    assert not torch.equal(gen.new_cache().prefix.tensors[0], before[0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_caches_are_continued(name):
    """From prefill, from an earlier generation, and from copies; each token of a text is read once."""
    gen, theirs = generator(name), oracle(name, 7)
    adaptc.swap(gen, theirs.path)
    inputs = text(3, 8, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = peft_said(theirs.model, inputs)
    past = gen.prefill(ids[:, :5], mask[:, :5])
    assert (past.length, past.prefix_length) == (12, 7)
    for one in (past.copy(), past, gen.new_cache(), gen.prefill(ids, mask)):
        assert torch.equal(said(gen, inputs, past_key_values=one), expected)
    out = said(gen, inputs, new=3, return_dict_in_generate=True)
    longer = torch.cat([mask, torch.ones(3, 3, dtype=torch.int64)], 1)
    more = {"input_ids": out.sequences, "attention_mask": longer}
    assert torch.equal(said(gen, more, new=4, past_key_values=out[cache_argument_name()]), expected)
    one = {n: t[:1] for n, t in inputs.items()}
    assert torch.equal(said(gen, one, prompt_lookup_num_tokens=3), said(gen, one))
    logits = gen(ids, attention_mask=mask).logits
    program = adaptc.compile(shared_base_program(name), theirs.path)
    seen = mask.bool()
    torch.testing.assert_close(logits[seen], program(**inputs).logits[:, 7:][seen])


@pytest.mark.long
@pytest.mark.parametrize("cls", METHODS)
def test_other_methods(cls, tmp_path):
    """Swapped into one program that was made for another number of tokens."""
    options = {**METHODS[cls], "task_type": "CAUSAL_LM"}
    first = {**options, "num_virtual_tokens": 2} if cls != "CPTConfig" else options
    config = {"CPTConfig": CPTConfig, "PromptEncoderConfig": PromptEncoderConfig}.get(cls, PromptTuningConfig)(**first)
    gen = adaptc.compile_for_generation(FAMILIES["qwen3"].build(), config, max_batch=12, max_length=60)
    theirs = prompt_oracle("qwen3", tmp_path / "peft", cls, **METHODS[cls])
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "saved.pt2"))
    adaptc.swap(gen, theirs.path)
    for inputs in (text(3, 7, "left"), text(1, 4, None)):
        assert torch.equal(said(gen, inputs), peft_said(theirs.model, inputs))
    adaptc.swap(loaded, theirs.path)
    assert torch.equal(said(loaded, inputs), peft_said(theirs.model, inputs))
    written = file_tensors(adaptc.save_adapter(loaded, tmp_path / "adapter"))
    torch.testing.assert_close(written["prompt_embeddings"], file_tensors(theirs.path)["prompt_embeddings"])
    unloaded = adaptc.unload(loaded)
    assert torch.equal(said(unloaded, inputs), generated(FAMILIES["qwen3"].build(), inputs, new=7))


@pytest.mark.long
def test_tasks(tmp_path):
    """Each row of a batch has its own, in beams and in caches, too."""
    config = MultitaskPromptTuningConfig(num_virtual_tokens=2, **TASKS)
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), config, max_batch=12, max_length=60)
    theirs = prompt_oracle("llama", tmp_path, "MultitaskPromptTuningConfig", num_virtual_tokens=5, **TASKS)
    adaptc.swap(gen, theirs.path)
    inputs, tasks = text(3, 7, "left"), torch.tensor([2, 0, 1])
    expected = peft_said(theirs.model, {**inputs, "task_ids": tasks})
    assert torch.equal(said(gen, {**inputs, "task_ids": tasks}), expected)
    assert not torch.equal(said(gen, {**inputs, "task_ids": tasks.flip(0)}), expected)
    past = gen.prefill(inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4], task_ids=tasks)
    assert torch.equal(said(gen, inputs, past_key_values=past), expected)
    logits = gen(**inputs, task_ids=tasks).logits
    program = adaptc.compile(shared_base_program("llama"), theirs.path)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], program(**inputs, task_ids=tasks).logits[:, 5:][seen])
    many = said(gen, {**inputs, "task_ids": tasks}, num_beams=3, num_return_sequences=2)
    for i in range(3):
        one = {**{n: t[i : i + 1] for n, t in inputs.items()}, "task_ids": tasks[i : i + 1]}
        assert torch.equal(said(gen, one, num_beams=3, num_return_sequences=2), many[2 * i : 2 * i + 2])
    for bad, message in (
        ({}, r"needs task_ids, a tensor \(batch\) of torch.int64; got None"),
        ({"task_ids": tasks[:2]}, "task_ids has 2 entries, and there are 3 rows"),
        ({"task_ids": tasks + 5}, "task_ids has 5, and the adapter has tasks from 0 to 2"),
        ({"task_ids": tasks, "past_key_values": past}, "task_ids says what a new cache begins with"),
        ({"task_ids": tasks, "position_ids": inputs["input_ids"]}, "position_ids is not taken behind"),
    ):
        with pytest.raises(AdaptcError, match=message):
            said(gen, {**inputs, **bad})
    with pytest.raises(AdaptcError, match="task_ids"):
        said(gen.bind(None), {**inputs, "task_ids": tasks})
    with pytest.raises(AdaptcError, match="in front of each of 3 rows, and the cache is for 2"):
        gen(inputs["input_ids"][:2], task_ids=tasks)
    assert torch.equal(said(gen, {**inputs, "task_ids": tasks}), expected)


@pytest.mark.long
def test_beside_lora(tmp_path):
    """LoRA sees virtual tokens as all others; either is taken away alone."""
    lora = LoraConfig(r=3, target_modules=["k_proj", "embed_tokens"], init_lora_weights=False)
    adapters = {"task": PromptTuningConfig(num_virtual_tokens=5), "style": lora}
    gen = adaptc.compile_for_generation(
        FAMILIES["qwen3"].build(), adapters, max_length=40, generator=torch.Generator().manual_seed(1)
    )
    saved = {name: adaptc.save_adapter(gen, tmp_path / name, adapter_name=name) for name in adapters}
    program = adaptc.compile(shared_base_program("qwen3"), saved)
    ids = text(2, 5, None)["input_ids"]
    assert torch.equal(said(gen, {"input_ids": ids}), continued(program, ids, 7))
    for name in adapters:
        adaptc.swap(gen, {name: None})
        adaptc.swap(program, {name: None})
        assert torch.equal(said(gen, {"input_ids": ids}), continued(program, ids, 7))
        adaptc.swap(gen, saved)
        adaptc.swap(program, saved)


@pytest.mark.long
def test_states(tmp_path):
    """A model that keeps a state reads them token by token; PEFT's forward of whole texts says what is right."""
    theirs = prompt_oracle("mamba", tmp_path, num_virtual_tokens=5, num_attention_heads=1)
    config = PromptTuningConfig(num_virtual_tokens=3)
    gen = adaptc.compile_for_generation(FAMILIES["mamba"].build(), config, max_length=60)
    adaptc.swap(gen, theirs.path)
    ids = text(2, 5, None)["input_ids"]
    expected = continued(theirs.model, ids, 6)
    assert torch.equal(said(gen, {"input_ids": ids}, 6), expected)
    past = gen.prefill(ids[:, :3])
    assert torch.equal(said(gen, {"input_ids": ids}, 6, past_key_values=past.copy()), expected)
    past.reset()
    assert (past.length, past.prefix_length) == (5, 5)
    assert torch.equal(said(gen, {"input_ids": ids}, 6, past_key_values=past), expected)


@pytest.mark.long
def test_room_and_refusals():
    """Tokens in front count among positions; what cannot have them says so."""
    gen = generator("gpt2")
    adaptc.swap(gen, oracle("gpt2", 13).path)
    inputs = text(2, 7, None)
    assert said(gen, inputs, 40).shape == (2, 47)
    with pytest.raises(AdaptcError, match=r"6[34] positions, 13 of them of tokens that the adapter has in front"):
        said(gen, inputs, 44)
    adaptc.swap(gen, {"prompt_embeddings": torch.randn(60, 24)})
    with pytest.raises(AdaptcError, match=r"puts 60 tokens in front, which leaves no room.*max_length=60"):
        said(gen, inputs)
    adaptc.swap(gen, oracle("gpt2", 13).path)
    with pytest.raises(MergeError, match="prompt_tuning"):
        adaptc.merge(gen)
    with pytest.raises(AdaptcError, match="inputs_embeds is not taken"):
        gen.generate(inputs_embeds=torch.zeros(1, 3, 24), attention_mask=torch.ones(1, 3), max_new_tokens=2)
    with quiet(*PROMPT_WARNINGS):
        model = first_gpt().model
    with (
        pytest.warns(adaptc.AdaptcWarning, match="generates without a cache"),
        pytest.raises(ConfigError, match=r"prompt_tuning is what a cache begins with.*generates without one"),
    ):
        adaptc.compile_for_generation(model, PromptTuningConfig(num_virtual_tokens=3))
