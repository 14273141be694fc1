"""Generation behind keys and values of an adapter's: PEFT's own forward says which token comes next."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import adaptc
from adaptc import CartridgeConfig, LoraConfig, PrefixTuningConfig
from adaptc.errors import AdaptcError, ConfigError, MergeError, TargetError
from adaptc.generation.spec import cache_argument_name
from tests.support.families import FAMILIES
from tests.support.oracle import file_tensors, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, prompt_oracle, run_quietly, text

#: grouped queries, absolute positions, rings, rings in some layers
NAMES = ["llama", "gpt2", "mistral", "gemma3_text"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PREFIX = "PrefixTuningConfig"


@cache
def generator(name):
    """One for all tests, which may swap it."""
    return adaptc.compile_for_generation(FAMILIES[name].build(), PrefixTuningConfig(num_virtual_tokens=3))


def continued(model, ids, tokens):
    """Greedy, by whole texts."""
    for _ in range(tokens):
        ids = torch.cat([ids, run_quietly(model, {"input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
def test_tokens(name, tmp_path):
    """Through swaps to other numbers of tokens, some of them more than windows hold; rows of a batch as alone."""
    gen = generator(name)
    gen.generate(text(2, 5)["input_ids"], max_new_tokens=3, **GREEDY)
    for count in (5, 1, 13):
        oracle = prompt_oracle(name, tmp_path / str(count), PREFIX, num_virtual_tokens=count, seed=count)
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(gen, oracle.path)
            ids = text(2, 5, None)["input_ids"]
            expected = continued(oracle.model, ids, 9)
            assert torch.equal(gen.generate(ids, max_new_tokens=9, **GREEDY), expected)
        if cache_argument_name() == "past_key_values":  # what PEFT looks for: with others it forgets the text
            with quiet(*PROMPT_WARNINGS):
                assert torch.equal(oracle.model.generate(input_ids=ids, max_new_tokens=9, **GREEDY), expected)
        padded = torch.nn.functional.pad(ids, (4, 0))
        mask = (padded != 0).long()
        got = gen.generate(padded, attention_mask=mask, max_new_tokens=9, **GREEDY)
        # Padding lies between the keys in front and the text, where a window sees it.
        if gen.spec.layout.sliding_window is None:
            assert torch.equal(got[:, 4:], expected)
    assert torch.equal(
        gen.bind(None).generate(ids, max_new_tokens=9, **GREEDY), continued(FAMILIES[name].build(), ids, 9)
    )


@pytest.mark.long
def test_bound_and_swapped_between(tmp_path):
    """What is bound keeps its keys, and so does a generation that has begun."""
    gen = generator("llama")
    oracles = [prompt_oracle("llama", tmp_path / str(n), PREFIX, num_virtual_tokens=n, seed=n) for n in (2, 7)]
    ids = text(2, 5, None)["input_ids"]
    one, two = (continued(o.model, ids, 6) for o in oracles)
    assert not torch.equal(one, two)
    bound = gen.bind(oracles[0].path)
    adaptc.swap(gen, oracles[1].path)
    assert torch.equal(bound.generate(ids, max_new_tokens=6, **GREEDY), one)
    assert torch.equal(gen.generate(ids, max_new_tokens=6, **GREEDY), two)

    class Swapper(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            adaptc.swap(gen, oracles[0].path)

        def end(self):
            pass

    assert torch.equal(gen.generate(ids[:1], streamer=Swapper(), max_new_tokens=6, **GREEDY), two[:1])
    assert torch.equal(gen.generate(ids, max_new_tokens=6, **GREEDY), one)


@pytest.mark.long
def test_caches_are_continued(tmp_path):
    """From prefill, from an earlier generation, from copies, and by beams."""
    gen = generator("llama")
    oracle = prompt_oracle("llama", tmp_path, PREFIX, num_virtual_tokens=5)
    adaptc.swap(gen, oracle.path)
    ids = text(2, 7, None)["input_ids"]
    expected = continued(oracle.model, ids, 6)
    cache = gen.prefill(ids[:, :4])
    assert cache.length == 5 + 4
    for past in (cache.copy(), gen.prefill(ids), gen.prefill(ids, torch.ones_like(ids)), gen.new_cache()):
        found = gen.generate(ids, past_key_values=past, max_new_tokens=6, **GREEDY)
        assert torch.equal(found, expected)
    mask = torch.ones(2, 5 + 7, dtype=torch.int64)
    found = gen.generate(ids[:, 4:], past_key_values=cache, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, expected[:, 4:])
    out = gen.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    # A token drawn may be the pad token, which transformers masks in a prompt that comes without a mask.
    rest = {"attention_mask": torch.ones_like(out.sequences), "past_key_values": out[cache_argument_name()]}
    again = gen.generate(out.sequences, **rest, max_new_tokens=3, **GREEDY)
    assert torch.equal(again, expected)
    beams = gen.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)
    whole = adaptc.compile_for_generation(FAMILIES["llama"].build(), oracle.path)
    assert torch.equal(beams, whole.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY))
    assert torch.equal(gen.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=6, **GREEDY), expected[:1])


@pytest.mark.long
def test_cartridges_and_lora(tmp_path):
    """A cartridge beside LoRA: the keys in front are LoRA's to see and not to change."""
    model = FAMILIES["qwen3"].build()
    lora = LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    adapters = {"task": CartridgeConfig(num_virtual_tokens=5), "style": lora}
    made = torch.Generator().manual_seed(1)
    gen = adaptc.compile_for_generation(model, adapters, generator=made)
    saved = {name: adaptc.save_adapter(gen, tmp_path / name, adapter_name=name) for name in adapters}
    program = adaptc.compile(shared_base_program("qwen3"), saved)
    ids = text(2, 5, None)["input_ids"]
    assert torch.equal(gen.generate(ids, max_new_tokens=6, **GREEDY), continued(program, ids, 6))


@pytest.mark.long
def test_files(tmp_path):
    oracle = prompt_oracle("gpt2", tmp_path / "peft", PREFIX, num_virtual_tokens=5)
    gen = adaptc.compile_for_generation(FAMILIES["gpt2"].build(), oracle.path)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "saved.pt2"))
    ids = text(2, 5, None)["input_ids"]
    assert torch.equal(loaded.generate(ids, max_new_tokens=6, **GREEDY), continued(oracle.model, ids, 6))
    written = file_tensors(adaptc.save_adapter(loaded, tmp_path / "adapter"))
    assert torch.equal(written["prompt_embeddings"], file_tensors(oracle.path)["prompt_embeddings"])
    unloaded = adaptc.unload(loaded)
    assert torch.equal(unloaded.generate(ids, max_new_tokens=6, **GREEDY), continued(FAMILIES["gpt2"].build(), ids, 6))
    assert not any("prompt" in name for name in unloaded.program.state_dict)


@pytest.mark.long
def test_room_and_refusals(tmp_path):
    """Keys in front count among positions; what cannot have them says so."""
    model = FAMILIES["llama"].build()
    gen = adaptc.compile_for_generation(model, PrefixTuningConfig(num_virtual_tokens=5), max_length=20)
    ids = text(2, 7, None)["input_ids"]
    assert gen.generate(ids, max_new_tokens=8, **GREEDY).shape == (2, 15)
    with pytest.raises(
        AdaptcError, match=r"2[12] positions, 5 of them of tokens that the adapter has in front,.*max_length=20"
    ):
        gen.generate(ids, max_new_tokens=10, **GREEDY)
    with pytest.raises(MergeError, match="prefix_tuning"):
        adaptc.merge(gen)
    with pytest.raises(AdaptcError, match="inputs_embeds is not taken"):
        gen.generate(inputs_embeds=torch.zeros(1, 3, 24), attention_mask=torch.ones(1, 3), max_new_tokens=2)
    with pytest.raises((TargetError, ConfigError), match="PREFIX_TUNING"):
        adaptc.compile_for_generation(
            FAMILIES["mamba"].build(), PrefixTuningConfig(num_virtual_tokens=5), max_length=20
        )
