"""Prefix tuning and cartridges in models with an encoder and a decoder: in front of the decoder's own tokens."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc import CartridgeConfig, LoraConfig, MultitaskPromptTuningConfig, PrefixTuningConfig, PromptTuningConfig
from adaptc.errors import AdaptcError, ConfigError, MergeError, SwapError, TargetError
from tests.support.cover import examples
from tests.support.families import VOCAB
from tests.support.oracle import (
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    load_peft,
    quiet,
)
from tests.support.prefixed import TASK_OPTIONS, build, prefix_oracle, random_prefix, run_with_cache_prefix
from tests.support.prompts import PROMPT_WARNINGS, run_quietly, text

CASES = {
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 13}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
}


def inputs(batch=3, length=7, padding="left", decoded=5, name="decoder_input_ids"):
    ids = torch.randint(4, VOCAB, (batch, decoded), generator=torch.Generator().manual_seed(batch))
    return {**text(batch, length, padding), name: ids}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
@pytest.mark.parametrize("case", CASES)
def test_training(family, case, tmp_path):
    """Losses and gradients by labels alone, which the model moves on by one itself; and files both ways."""
    cls, options = CASES[case]
    theirs = prefix_oracle(family, tmp_path / "peft", cls, num_virtual_tokens=5, **options)
    program = adaptc.compile(
        build(family), getattr(adaptc, cls)(**TASK_OPTIONS, num_virtual_tokens=5, **options), training=True
    )
    module = theirs.module_with_peft_values(program).eval()
    if case == "cartridge":  # what does not train, too
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        frozen = theirs.model.prompt_encoder["default"].frozen_embedding
        own["prompt_encoder.default.frozen_embedding"].copy_(frozen)
    given_ = inputs(name="labels")
    with quiet(*PROMPT_WARNINGS):
        got, want = module(**given_), theirs.model(**given_)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    assert_differs(want.logits, run_quietly(build(family), given_).logits)
    assert_same_gradients(gradients(module, got), gradients(theirs.model, want))
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    torch.testing.assert_close(file_tensors(saved)["prompt_embeddings"], file_tensors(theirs.path)["prompt_embeddings"])
    with quiet(*PROMPT_WARNINGS):
        loaded = load_peft(build(family), saved)
    expected = run_quietly(theirs.model, inputs())
    assert_same(run_quietly(loaded, inputs()), expected)
    assert_same(run_quietly(adaptc.compile(build(family), theirs.path), inputs()), expected)


@cache
def program(family, each=1):
    config = PrefixTuningConfig(num_virtual_tokens=3, num_transformer_submodules=each)
    if family != "whisper":
        return adaptc.compile(build(family), config)
    return adaptc.compile(build(family), config, example_inputs=recording(2, 3))


def recording(batch, decoded):
    c = build("whisper").config
    made = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, c.num_mel_bins, 2 * c.max_source_positions, generator=made)
    return {"input_features": features, "decoder_input_ids": torch.randint(4, VOCAB, (batch, decoded), generator=made)}


@pytest.mark.long
@settings(max_examples=examples(16))
@given(
    family=st.sampled_from(["bart", "mbart", "t5", "whisper"]),
    each=st.sampled_from([1, 2]),
    count=st.integers(1, 9),
    size=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6)),
    padding=st.sampled_from(["left", "right", None]),
)
def test_any_sizes(family, each, count, size, padding):
    """transformers' own cache with those keys and values in it says what is right."""
    model, (batch, length, decoded), found = build(family), size, program(family, each)
    front = random_prefix(model, count, count)
    given_ = recording(batch, decoded) if family == "whisper" else inputs(batch, length, padding, decoded)
    expected = run_with_cache_prefix(model, front, given_, each).logits
    assert_same(run_quietly(found.bind({"prompt_embeddings": front}), given_).logits, expected)
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(found, {"prompt_embeddings": front})
        assert_same(run_quietly(found, given_).logits, expected)
    assert_same(run_quietly(found.bind(None), given_).logits, run_quietly(model, given_).logits)


@pytest.mark.long
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_mask_of_decoded_tokens(family):
    """One for the caller's tokens; those in front are always seen."""
    model, given_ = build(family), {**inputs(), "decoder_attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    given_["decoder_attention_mask"][1, 3:] = 0
    found = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=3), example_inputs=given_)
    front = random_prefix(model, 4)
    adaptc.swap(found, {"prompt_embeddings": front})
    longer = torch.nn.functional.pad(given_["decoder_attention_mask"], (4, 0), value=1)
    expected = run_with_cache_prefix(model, front, {**given_, "decoder_attention_mask": longer}).logits
    assert_same(run_quietly(found, given_).logits, expected)
    assert_differs(expected[1, 4:], run_with_cache_prefix(model, front, inputs()).logits[1, 4:])


@pytest.mark.long
def test_saved_programs(tmp_path):
    theirs = prefix_oracle("bart", tmp_path / "peft", num_virtual_tokens=5)
    found = adaptc.compile(build("bart"), theirs.path)
    found.validate()
    assert adaptc.verify(found, build("bart")).ok
    loaded = adaptc.load(adaptc.save(found, tmp_path / "ours.pt2"))
    assert_same(run_quietly(loaded, inputs()).logits, run_quietly(theirs.model, inputs()).logits)
    other = prefix_oracle("bart", tmp_path / "other", num_virtual_tokens=2, seed=1)
    adaptc.swap(loaded, other.path)
    assert_same(run_quietly(loaded, inputs()).logits, run_quietly(other.model, inputs()).logits)
    bare = adaptc.unload(loaded)
    assert_same(run_quietly(bare, inputs()).logits, run_quietly(build("bart"), inputs()).logits)
    assert len(bare.graph.nodes) == len(adaptc.unload(adaptc.compile(build("bart"), CONFIG)).graph.nodes)


CONFIG = PrefixTuningConfig(num_virtual_tokens=3)


@pytest.mark.long
def test_beside_others(tmp_path):
    """LoRA in both stacks, and tokens in front of what the encoder reads: all of them at once."""
    model, front = build("bart"), random_prefix(build("bart"), 4)
    names = {"front": CONFIG, "lora": LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)}
    found = adaptc.compile(model, {**names, "prompt": PromptTuningConfig(num_virtual_tokens=2)})
    lora = adaptc.compile(model, {n: c for n, c in names.items() if n == "lora"})
    both = adaptc.compile(model, {"front": CONFIG, "prompt": PromptTuningConfig(num_virtual_tokens=2)})
    prompt = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    alone = {"front": {"prompt_embeddings": front}, "prompt": {"prompt_embeddings": prompt}}
    adaptc.swap(both, alone)
    mask = torch.nn.functional.pad(inputs()["attention_mask"], (6, 0), value=1)
    embedded = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(inputs()["input_ids"])], 1)
    longer = {"inputs_embeds": embedded, "attention_mask": mask, "decoder_input_ids": inputs()["decoder_input_ids"]}
    assert_same(run_quietly(both, inputs()).logits, run_with_cache_prefix(model, front, longer).logits)
    adaptc.swap(found, {**alone, "lora": adaptc.save_adapter(lora, tmp_path, adapter_name="lora")})
    twin, merged = build("bart"), adaptc.merge(lora).state_dict
    own = twin.state_dict()
    assert sum(n in own and not torch.equal(own[n], t) for n, t in merged.items()) == 6
    twin.load_state_dict({**own, **{n: t for n, t in merged.items() if n in own}})
    expected = run_with_cache_prefix(twin, front, longer).logits
    assert_same(run_quietly(found, inputs()).logits, expected, 2e-5)  # a product is added, or is in the weight
    assert_differs(expected, run_quietly(both, inputs()).logits)


TASKS = MultitaskPromptTuningConfig(**TASK_OPTIONS, num_virtual_tokens=3, num_tasks=2, num_ranks=2)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
@pytest.mark.parametrize("order", [("front", "tasks"), ("tasks", "front")])
@pytest.mark.parametrize("name", ["decoder_input_ids", "labels"])
def test_beside_tokens_of_the_decoders(family, order, name):
    """Keys and values come before all tokens, whichever is named first."""
    name = "decoder_input_ids" if family == "mbart" else name
    model, given_, made = build(family), inputs(name=name), torch.Generator().manual_seed(1)
    configs = {"front": CONFIG, "tasks": TASKS}
    found = adaptc.compile(model, {n: configs[n] for n in order}, example_inputs=given_)
    shapes = {"prompt_embeddings": (6, 24), "prefix_task_cols": (2, 6, 2), "prefix_task_rows": (2, 2, 24)}
    tasks = {n: torch.randn(shape, generator=made) for n, shape in shapes.items()}
    front, ids = random_prefix(model, 4), torch.tensor([1, 0, 1])
    adaptc.swap(found, {"front": {"prompt_embeddings": front}, "tasks": tasks})
    first, second = (tasks[f"prefix_task_{n}"][ids] for n in ("cols", "rows"))
    prompts = (tasks["prompt_embeddings"] * (first @ second)).split(3, 1)
    table = model.get_input_embeddings()
    decoded = given_[name] if name != "labels" else model.prepare_decoder_input_ids_from_labels(given_[name])
    longer = {
        "inputs_embeds": torch.cat([prompts[0], table(given_["input_ids"])], 1),
        "attention_mask": torch.nn.functional.pad(given_["attention_mask"], (3, 0), value=1),
        "decoder_inputs_embeds": torch.cat([prompts[1], table(decoded)], 1),
    }
    assert_same(
        run_quietly(found, {**given_, "task_ids": ids}).logits, run_with_cache_prefix(model, front, longer).logits
    )


@pytest.mark.long
def test_first_values_from_a_cache():
    model, dec = build("bart"), torch.tensor([[5, 9, 11, 4, 7, 20]])
    found = adaptc.compile(build("bart"), CONFIG)
    read = {**text(1, 7, None), "decoder_input_ids": dec[:, :4]}
    with torch.no_grad():
        past = model(**read)
    adaptc.prefixes.initialize_kv_prefix_from_past_key_values(found, past_key_values=past[1], num_virtual_tokens=4)
    expected = run_quietly(model, {**read, "decoder_input_ids": dec}).logits[:, 4:]
    assert_same(run_quietly(found, {**read, "decoder_input_ids": dec[:, 4:]}).logits, expected)
    two = adaptc.compile(build("bart"), PrefixTuningConfig(**TASK_OPTIONS, num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="compile with num_transformer_submodules=1"):
        adaptc.prefixes.initialize_kv_prefix_from_past_key_values(two, past_key_values=past[1])
    with pytest.raises(ConfigError, match="this one has an encoder, which would have to read something, too"):
        adaptc.prefixes.initialize_kv_prefix_from_text(found, text=dec)


@pytest.mark.long
def test_a_swap_with_a_config_that_leaves_sizes_to_the_model(tmp_path):
    found = adaptc.compile(build("bart"), CONFIG)
    front = random_prefix(build("bart"), 5)
    adaptc.swap(found, {"prompt_embeddings": front}, config=PrefixTuningConfig(num_virtual_tokens=5))
    assert_same(run_quietly(found, inputs()).logits, run_with_cache_prefix(build("bart"), front, inputs()).logits)
    again = adaptc.compile(build("bart"), adaptc.save_adapter(found, tmp_path))
    assert_same(run_quietly(again, inputs()).logits, run_quietly(found, inputs()).logits)
    assert again.binding.config.num_layers == 2


@pytest.mark.long
def test_refusals(tmp_path):
    found = adaptc.compile(build("bart"), CONFIG)
    other = adaptc.compile(build("bart"), PrefixTuningConfig(**TASK_OPTIONS, num_virtual_tokens=3))
    before = run_quietly(found, inputs()).logits
    with pytest.raises(SwapError, match="was compiled for submodules=1, and the adapter has submodules=2"):
        adaptc.swap(found, adaptc.save_adapter(other, tmp_path))
    with pytest.raises(MergeError, match="prefix_tuning changes what the program reads"):
        adaptc.merge(found)
    with pytest.raises(ConfigError, match="num_layers=5, and the program has 2"):
        adaptc.compile(build("bart"), CartridgeConfig(num_virtual_tokens=3, num_layers=5))
    with pytest.raises(ConfigError, match="num_transformer_submodules=3 is not supported for a model of an encoder"):
        adaptc.compile(build("bart"), CONFIG.replace(num_transformer_submodules=3))
    with pytest.raises(TargetError, match="the program has neither decoder_input_ids nor labels"):
        adaptc.compile(build("bart").get_encoder(), CONFIG)
    with pytest.raises(TargetError, match="in front the model makes another first token: capture it with decoder_inp"):
        adaptc.compile(build("mbart"), TASKS, example_inputs=inputs(name="labels"))
    with pytest.raises(AdaptcError, match="40 tokens in front"):
        found.bind({"prompt_embeddings": random_prefix(build("bart"), 40)})(**inputs(decoded=25))
    assert torch.equal(run_quietly(found, inputs()).logits, before)
