"""Prefixes and cartridges made of a text or a cache, and of each other, next to PEFT's: values, logits, files."""

from __future__ import annotations

import json
from functools import cache

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc import CartridgeConfig, LoraConfig, PrefixTuningConfig, prefixes
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache.cache_layout import State, StateLayout, cache_from_output
from adaptc.generation.cache.state_cache import StateCache
from adaptc.generation.cache.step_cache import as_transformers_cache
from adaptc.generation.spec import cache_argument_name
from tests.support.chats import tokenizer
from tests.support.cover import examples
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import assert_same, file_tensors, load_peft, quiet, shared_base_program, with_head
from tests.support.prompts import PROMPT_WARNINGS, prompt_oracle, run_quietly, text

CARTRIDGE, PREFIX = "CartridgeConfig", "PrefixTuningConfig"
WORDS = " ".join(f"w{i}" for i in (9, 31, 17, 44, 8, 25, 60, 12, 33, 50, 21))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def words(count, seed=0):
    """Ids (1, count)."""
    return torch.randint(4, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def cache_after(name, ids):
    with torch.no_grad():
        return cache_from_output(FAMILIES[name].build()(input_ids=ids, use_cache=True))


def expected_rows(name, ids, count):
    """What PEFT makes of the model's own cache."""
    return peft.prompt_embeddings_from_past_key_values(cache_after(name, ids), num_virtual_tokens=count)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", [CARTRIDGE, PREFIX])
def test_from_text_as_peft(name, kind, tmp_path):
    """The same values in PEFT's model and in programs of both kinds, then logits, and files both ways."""
    more = {"num_frozen_tokens": 2} if kind == CARTRIDGE else {}
    oracle = prompt_oracle(name, tmp_path / "peft", kind, num_virtual_tokens=5, **more)
    with quiet(*PROMPT_WARNINGS):
        # No more than a window: of longer texts PEFT takes later tokens in layers that have one.
        options = {"text": WORDS, **({"max_length": 5} if name == "gemma3_text" else {})}
        want = peft.initialize_kv_prefix_from_text(oracle.model, tokenizer(), **options)
    program = adaptc.compile(shared_base_program(name), tmp_path / "peft")
    run_quietly(program, text(2, 5))
    with adaptc.debug.assert_no_recompiles():
        got = prefixes.initialize_kv_prefix_from_text(program, tokenizer(), **options)
        close(got, want)
        assert_same(run_quietly(program, text(3, 7)), run_quietly(oracle.model, text(3, 7)))
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    assert torch.equal(file_tensors(saved)["prompt_embeddings"], got)
    with quiet(*PROMPT_WARNINGS):
        oracle.model.save_pretrained(str(tmp_path / "again"))
        assert_same(
            run_quietly(load_peft(FAMILIES[name].build(), saved), text(3, 7)), run_quietly(oracle.model, text(3, 7))
        )
    stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "again")]
    assert stored[0] == stored[1]
    adaptc.swap(program, tmp_path / "peft")
    ids = tokenizer()(WORDS, return_tensors="pt")["input_ids"][:, :5]
    again = prefixes.initialize_kv_prefix_from_past_key_values(program, past_key_values=cache_after(name, ids))
    assert not torch.allclose(again, got, atol=1e-3)  # without the template
    plain = {"use_chat_template": False, **options, "max_length": 5}
    close(prefixes.initialize_kv_prefix_from_text(program, tokenizer(), **plain), again)
    close(prefixes.initialize_kv_prefix_from_text(program, tokenizer(None), text=WORDS, max_length=5), again)
    with quiet(*PROMPT_WARNINGS):
        close(peft.initialize_kv_prefix_from_text(oracle.model, tokenizer(), **plain), again)


@cache
def generator(name):
    """One for all tests, which may swap it."""
    return adaptc.compile_for_generation(FAMILIES[name].build(), CartridgeConfig(num_virtual_tokens=3))


@cache
def program(name):
    return adaptc.compile(shared_base_program(name), CartridgeConfig(num_virtual_tokens=3))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_generators(name):
    """A text whose keys are in front is a text that was read; longer than a window, too, which PEFT cannot have."""
    gen, ids = generator(name), words(13)
    gen.generate(words(4), max_new_tokens=2, **GREEDY)
    for count in (11, 2):
        with adaptc.debug.assert_no_recompiles():
            rows = prefixes.initialize_kv_prefix_from_text(gen, text=ids, num_virtual_tokens=count)
        close(rows, prefixes.initialize_kv_prefix_from_text(program(name), text=ids[0], num_virtual_tokens=count))
        assert gen.binding.config.num_virtual_tokens == count
        assert gen.binding.config.num_frozen_tokens == 1
        tail = words(6, 1)
        whole = torch.cat([ids[:, :count], tail], 1)
        want = gen.base.generate(whole, max_new_tokens=5, **GREEDY)
        assert torch.equal(gen.generate(tail, max_new_tokens=5, **GREEDY), want[:, count:])
        torch.testing.assert_close(
            run_quietly(program(name), {"input_ids": tail}).logits,
            run_quietly(shared_base_program(name), {"input_ids": whole}).logits[:, count:],
        )


@pytest.mark.long
def test_caches_of_generators():
    """What prefill gives is a cache as all others; what it lacks is told."""
    gen, ids = generator("llama"), words(9)
    want = expected_rows("llama", ids, 7)
    close(prefixes.prompt_embeddings_from_past_key_values(gen.base.prefill(ids), num_virtual_tokens=7), want)
    close(
        prefixes.initialize_kv_prefix_from_past_key_values(
            gen, past_key_values=gen.base.prefill(ids), num_virtual_tokens=3
        ),
        want[:3],
    )
    close(
        prefixes.initialize_kv_prefix_from_past_key_values(gen, past_key_values=gen.base.prefill(ids[:, :7])),
        want[:3],
    )
    take = prefixes.prompt_embeddings_from_past_key_values
    with pytest.raises(AdaptcError, match="nothing is in this cache"):
        take(gen.base.new_cache(), num_virtual_tokens=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(AdaptcError, match="are padding"):
        take(gen.base.prefill(ids, mask), num_virtual_tokens=1)
    with pytest.raises(AdaptcError, match=r"shape \(2, 2, 9, 8\).*one sequence"):
        take(gen.base.prefill(ids.expand(2, -1)), num_virtual_tokens=1)
    states = StateLayout((), torch.float32, states=(State(0, "conv_states", 0, (3,), torch.float32),))
    with pytest.raises(AdaptcError, match="keeps states"):
        take(as_transformers_cache(StateCache)(states, None, 9, torch.device("cpu")), num_virtual_tokens=1)
    sliding = generator("mistral")
    past = sliding.base.prefill(words(40))
    sliding.base.forward(words(1), past_key_values=past)
    with pytest.raises(AdaptcError, match="look back on"):
        take(past, num_virtual_tokens=1)


@pytest.mark.long
def test_half_precision_and_files(tmp_path):
    """The adapter is float32 above a base of bfloat16, of which the values are; a file of a program does as it does."""
    model = FAMILIES["qwen3"].build().to(torch.bfloat16)
    prog = adaptc.compile(model, CartridgeConfig(num_virtual_tokens=3))
    rows = prefixes.initialize_kv_prefix_from_text(prog, text=words(7))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(torch.cat(list(prog.binding.values.values())), rows.float())
    assert torch.equal(
        prefixes.prompt_embeddings_from_past_key_values(half(model, words(3)), num_virtual_tokens=3), rows
    )
    loaded = adaptc.load(adaptc.save(prog, tmp_path / "saved.pt2"))
    assert torch.equal(prefixes.initialize_kv_prefix_from_text(loaded, text=words(7)), rows)


def half(model, ids):
    """A cache of fixed room, most of which is empty."""
    room = transformers.StaticCache(model.config, max_cache_len=11)
    with torch.no_grad():
        model(input_ids=ids, **{cache_argument_name(): room})
    return room


@settings(max_examples=examples(20))
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    length=st.integers(1, 7),
    data=st.data(),
)
def test_embeddings_of_any_cache(layers, heads, width, length, data):
    count = data.draw(st.integers(1, length))
    pairs = [tuple(torch.randn(2, 1, heads, length, width)) for _ in range(layers)]
    want = peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=count)
    for past in (pairs, tuple(pairs), transformers.DynamicCache(pairs)):
        got = prefixes.prompt_embeddings_from_past_key_values(past, num_virtual_tokens=count)
        assert torch.equal(got, want)
    got.zero_()
    assert all(bool(t.any()) for pair in pairs for t in pair)


def test_caches_that_do_not_fit():
    take = prefixes.prompt_embeddings_from_past_key_values
    pairs = [tuple(torch.randn(2, 1, 2, 7, 8)) for _ in range(2)]
    for count in (0, -1, True, "3"):
        with pytest.raises(ConfigError, match="positive integer"):
            take(pairs, num_virtual_tokens=count)
    with pytest.raises(AdaptcError, match="7 tokens, and 8 are needed"):
        take(pairs, num_virtual_tokens=8)
    with pytest.raises(AdaptcError, match="keys of layer 1 have 2 heads of 5"):
        take([pairs[0], tuple(torch.randn(2, 1, 2, 7, 5))], num_virtual_tokens=3)
    with pytest.raises(AdaptcError, match="no layers"):
        take([], num_virtual_tokens=3)
    for odd in (torch.zeros(3), 5, [3], [(None, None)]):
        with pytest.raises(AdaptcError, match="a cache of one sequence"):
            take(odd, num_virtual_tokens=3)
    # A window of 6: transformers' cache has forgotten the first tokens, and PEFT takes others for them.
    with pytest.raises(AdaptcError, match="keeps the last"):
        take(cache_after("mistral", words(13)), num_virtual_tokens=3)
    target = program("llama")
    before = dict(target.binding.values)
    for shape, told in (
        ((2, 1, 4, 7, 4), "num_attention_heads=4, and the program 2"),
        ((2, 1, 2, 7, 9), "token_dim=18, and the program 16"),
    ):
        cached = [tuple(torch.randn(shape)) for _ in range(2)]
        with pytest.raises(ConfigError, match=told):
            prefixes.initialize_kv_prefix_from_past_key_values(target, past_key_values=cached)
    with pytest.raises(ConfigError, match="num_layers=3"):
        prefixes.initialize_kv_prefix_from_past_key_values(target, past_key_values=[*pairs, pairs[0]])
    assert all(target.binding.values[n] is t for n, t in before.items())


@pytest.mark.long
def test_training_goes_on_from_a_text(tmp_path):
    """Frozen tokens are the text's, and do not train; modules that are trained as a whole stay as they are."""
    config = CartridgeConfig(task_type="SEQ_CLS", num_virtual_tokens=5, num_frozen_tokens=2)
    kind = transformers.LlamaForSequenceClassification
    prog = adaptc.compile(with_head(kind, "llama", num_labels=3), config, training=True)
    adaptc.save_adapter(prog, tmp_path / "before")
    head = {n: t for n, t in file_tensors(tmp_path / "before").items() if "score" in n}
    assert head
    ids = words(11)
    rows = prefixes.initialize_kv_prefix_from_text(prog, text=ids)
    close(rows, expected_rows("llama", ids, 5))
    module = prog.module()
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    assert torch.equal(found["prompt_encoder.default.frozen_embedding"], rows[:2])
    assert torch.equal(found["prompt_encoder.default.trainable_embedding"], rows[2:])
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5)
    module(**text(3, 7), labels=torch.tensor([0, 2, 1])).loss.backward()
    optimizer.step()
    after = file_tensors(adaptc.save_adapter(prog, tmp_path / "after"))
    assert torch.equal(after["prompt_embeddings"][:2], rows[:2])
    assert not torch.equal(after["prompt_embeddings"][2:], rows[2:])
    adaptc.swap(prog, tmp_path / "before")
    prefixes.initialize_kv_prefix_from_text(prog, text=ids)
    again = file_tensors(adaptc.save_adapter(prog, tmp_path / "again"))
    assert all(torch.equal(again[n], t) for n, t in head.items())
    with pytest.raises(ConfigError, match="num_frozen_tokens=2 is more than the 1"):
        prefixes.initialize_kv_prefix_from_text(prog, text=ids, num_virtual_tokens=1)


@pytest.mark.long
def test_beside_other_adapters():
    """The base reads the text, not LoRA; and LoRA stays as it is."""
    lora = LoraConfig(r=3, target_modules=["k_proj", "embed_tokens"], init_lora_weights=False)
    prog = adaptc.compile(shared_base_program("llama"), {"style": lora, "task": CartridgeConfig(num_virtual_tokens=3)})
    style = prog.binding.joint_adapters["style"]
    rows = prefixes.initialize_kv_prefix_from_text(prog, text=words(7), adapter_name="task", num_virtual_tokens=6)
    close(rows, expected_rows("llama", words(7), 6))
    assert prog.binding.joint_adapters["style"] is style
    assert prog.binding.joint_adapters["task"].config.num_virtual_tokens == 6
    close(prefixes.initialize_kv_prefix_from_text(prog, text=words(7)), rows)
    prog.set_active("style")
    close(prefixes.initialize_kv_prefix_from_text(prog, text=words(7)), rows)  # a swap turns it on
    assert prog.active_adapters == ["style", "task"]
    with pytest.raises(ConfigError, match="'style' is a LORA adapter"):
        prefixes.initialize_kv_prefix_from_text(prog, text=words(7), adapter_name="style")
    with pytest.raises(ConfigError, match="no adapter called 'other'; it has 'style', 'task'"):
        prefixes.initialize_kv_prefix_from_text(prog, text=words(7), adapter_name="other")


@pytest.mark.long
def test_encoders_read_the_whole_text():
    """Keys of an encoder follow from what comes behind them, and segments are the first one."""
    model = with_head(transformers.BertModel, "bert")
    prog = adaptc.compile(model, PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3))
    made = []
    for layer in model.encoder.layer:
        for part in (layer.attention.self.key, layer.attention.self.value):
            part.register_forward_hook(lambda m, args, out: made.append(out))
    ids = words(9)
    with torch.no_grad():
        model(input_ids=ids)
    rows = prefixes.initialize_kv_prefix_from_text(prog, text=ids)
    close(rows, torch.cat([t[0, :3] for t in made], 1))
    short = prefixes.initialize_kv_prefix_from_text(prog, text=ids, max_length=5)
    assert not torch.allclose(rows, short, atol=1e-4)


@pytest.mark.long
def test_texts_that_do_not_fit():
    prog, gen = program("gpt2"), generator("gpt2")
    start = prefixes.initialize_kv_prefix_from_text
    for target in (prog, gen):
        before = target.binding
        with pytest.raises(ConfigError, match="2 tokens, and 3 are put in front"):
            start(target, text=words(2), num_virtual_tokens=3)
        with pytest.raises(ConfigError, match="2 tokens, and 3 are put in front"):
            start(target, text=words(9), num_virtual_tokens=3, max_length=2)
        with pytest.raises(ConfigError, match="there is no tokenizer"):
            start(target, text=WORDS)
        with pytest.raises(ConfigError, match="need no tokenizer"):
            start(target, tokenizer(), text=words(5))
        with pytest.raises(ConfigError, match="no tokens"):
            start(target, text=[])
        with pytest.raises(ConfigError, match="no tokens"):
            start(target, tokenizer(None), text="")
        with pytest.raises(ConfigError, match="whole numbers"):
            start(target, text=words(6).reshape(2, 3))
        with pytest.raises(ConfigError, match="whole numbers"):
            start(target, text=[0.5, 1.0, 2.0])
        with pytest.raises(ConfigError, match="max_length=0"):
            start(target, text=words(6), max_length=0)
        with pytest.raises(AdaptcError, match=f"to {VOCAB}"):
            start(target, text=[4, VOCAB, 5])
        with pytest.raises(ConfigError, match="num_virtual_tokens must be a positive integer, got 0"):
            start(target, text=words(6), num_virtual_tokens=0)
        assert target.binding is before
    with pytest.raises(AdaptcError, match="70 tokens, which is more than the model has positions for"):
        start(prog, text=words(70))
    free = {"input_ids": {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=12)}}
    options = {"example_inputs": {"input_ids": words(5).expand(2, -1)}, "dynamic_shapes": free}
    captured = adaptc.compile(FAMILIES["gpt2"].build(), CartridgeConfig(num_virtual_tokens=3), **options)
    with pytest.raises(AdaptcError, match=r"13 tokens, and the program takes 12: .*max_length=12"):
        start(captured, text=words(13))
    close(start(captured, text=words(13), max_length=12), expected_rows("gpt2", words(13), 3))
    assert torch.equal(start(prog, text=words(70), max_length=64), start(prog, text=words(70)[0, :64].tolist()))
    with pytest.raises(AdaptcError, match="leaves no room"):
        start(gen, text=words(70), num_virtual_tokens=64)
    with pytest.raises(AdaptcError, match="takes what generates"):
        start(gen.program, text=words(5))
    with pytest.raises(AdaptcError, match="initialize_kv_prefix_from_text takes what"):
        start(FAMILIES["llama"].build(), text=words(5))
    projected = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)
    with pytest.raises(ConfigError, match="makes its keys and values by a network"):
        start(adaptc.compile(shared_base_program("llama"), projected), text=words(5))
    with pytest.raises(ConfigError, match="is a LORA adapter"):
        start(adaptc.compile(shared_base_program("llama"), LoraConfig(r=3)), text=words(5))
