"""Adaption prompts: tokens that layers of attention have to themselves, held against PEFT and against the formula."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import adaptc
from adaptc import AdaptionPromptConfig, LoraConfig
from tests.support.extra_tokens import (
    draw_adaption_prompts,
    from_interleaved_layer,
    from_packed_layer,
    from_separate_layers,
    with_adaption_prompts,
)
from tests.support.families import FAMILIES, VOCAB, perturb
from tests.support.subject import FILE, assert_valid, file_key_of, quiet

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
#: PEFT takes these three; of Llama and Mistral such alone whose heads are as wide as the model together
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **_SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=1, sliding_window=None, **_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(bos_token_id=1, **_GPT2)),
}
OPTIONS = {"adapter_len": 5, "adapter_layers": 2}
OTHER = {"adapter_len": 3, "adapter_layers": 1}


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    perturb(model)
    return model


@cache
def plain(name: str) -> adaptc.AdaptedProgram:
    return adaptc.unload(adaptc.compile(built(name), AdaptionPromptConfig(**OPTIONS)))


def ids(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def padded(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :2] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def wrapped(model: nn.Module, seed: int | None = 5, **options: Any) -> Any:
    with quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **{**OPTIONS, **options})
        )
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p) * 0.7)
    return theirs.eval()


def logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**(inputs if isinstance(inputs, dict) else {"input_ids": inputs})).logits


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def apart_from(one: Tensor, other: Tensor) -> None:
    assert float((one - other).abs().max()) > 1e-2


def gradients(module: Any) -> dict[str, Tensor]:
    out = module(input_ids=ids())
    weights = torch.linspace(-1, 2, out.logits.numel()).reshape(out.logits.shape)
    (out.logits * weights).sum().backward()
    return {file_key_of(n): p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_first_values_are_those_of_peft_and_change_nothing(name: str) -> None:
    base = plain(name)
    torch.manual_seed(9)
    theirs = wrapped(built(name), None)
    torch.manual_seed(9)
    program = adaptc.compile(base, AdaptionPromptConfig(**OPTIONS))
    assert_valid(program)
    expected = {file_key_of(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    found = {file_key_of(n): t for n, t in program.binding.values.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], p) for k, p in expected.items())
    assert torch.equal(logits(program, ids()), logits(plain(name), ids()))
    config = program.binding.config
    assert config.to_dict()["target_modules"] == theirs.peft_config["default"].target_modules


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    theirs = wrapped(built(name))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    program = adaptc.compile(built(name), tmp_path / "theirs", training=True)
    assert_valid(program)
    for inputs in (padded(), padded(2, 11), ids(1, 2)):
        same(logits(program, inputs), logits(theirs, inputs))
        apart_from(logits(theirs, inputs), logits(built(name), inputs))
    module = program.module().eval()
    found, expected = gradients(module), gradients(theirs)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        same(found[key] / grad.abs().max(), grad / grad.abs().max())
    written = adaptc.save_adapter(program, tmp_path / "ours")
    ours, given = load_file(written / FILE), load_file(tmp_path / "theirs" / FILE)
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[k], t) for k, t in given.items())
    with quiet():
        back = peft.PeftModel.from_pretrained(copy.deepcopy(built(name)), str(written)).eval()
    same(logits(back, padded()), logits(theirs, padded()))


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_other_lengths_and_fewer_layers_run_through_the_same_code(name: str, tmp_path: Path) -> None:
    one, two = wrapped(built(name)), wrapped(built(name), 6, **OTHER)
    one.save_pretrained(str(tmp_path / "one"))
    two.save_pretrained(str(tmp_path / "two"))
    program = adaptc.compile(plain(name), AdaptionPromptConfig(**OPTIONS))
    logits(program, padded())
    with adaptc.debug.assert_no_recompiles():
        for path, theirs in (("two", two), ("one", one), ("two", two)):
            adaptc.swap(program, tmp_path / path)
            same(logits(program, padded()), logits(theirs, padded()))
            assert_valid(program)
        bound = program.bind(tmp_path / "one")
        same(logits(bound, padded()), logits(one, padded()))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert torch.equal(logits(loaded, padded()), logits(program, padded()))
    adaptc.swap(loaded, tmp_path / "one")
    same(logits(loaded, padded()), logits(one, padded()))
    assert_valid(loaded)
    narrow = adaptc.compile(plain(name), tmp_path / "two")
    with pytest.raises(adaptc.SwapError, match="adaption_gate"):
        adaptc.swap(narrow, tmp_path / "one")
    unloaded = adaptc.unload(program)
    assert_valid(unloaded)
    assert torch.equal(logits(unloaded, padded()), logits(plain(name), padded()))


#: how the layers of a family make keys and values
MADE: dict[str, Any] = {
    "llama": from_separate_layers,  # whose heads are wider than the model together, which PEFT gets wrong
    "qwen2": from_separate_layers,  # biases
    "qwen3": from_separate_layers,  # queries are normed
    "gemma3_text": from_separate_layers,
    "opt": from_separate_layers,  # queries are scaled before
    "phi": from_separate_layers,  # half of a head is turned
    "phi3": from_packed_layer("qkv_proj"),
    "gpt_neox": from_interleaved_layer("query_key_value"),
}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", MADE)
def test_any_model_by_the_formula(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    program = adaptc.compile(model, AdaptionPromptConfig(**OPTIONS), example_inputs=family.inputs(2, 6))
    slots = draw_adaption_prompts(program)
    inputs = family.inputs(3, 9)
    with with_adaption_prompts(model, slots, MADE[name]):
        expected = logits(model, inputs)
    apart_from(expected, logits(model, inputs))
    same(logits(program, inputs), expected)
    assert adaptc.verify(program, model).ok


@pytest.mark.long
def test_a_bias_behind_the_attention_is_added_once() -> None:
    torch.manual_seed(2)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attention_bias=True, **_SIZES)).eval()
    perturb(model)
    program = adaptc.compile(model, AdaptionPromptConfig(**OPTIONS))
    same(logits(program, padded()), logits(model, padded()))
    apart_from(logits(wrapped(model, None), padded()), logits(model, padded()))  # PEFT


@pytest.mark.long
def test_beside_lora_of_the_same_layers(tmp_path: Path) -> None:
    """Queries and the projection behind are those that LoRA made, keys and values of the tokens the base's."""
    config = LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    program = adaptc.compile(built("llama"), {"task": config, "prompt": AdaptionPromptConfig(**OPTIONS)})
    assert_valid(program)
    torch.manual_seed(4)
    slots, model = {}, copy.deepcopy(built("llama"))
    with torch.no_grad():
        for a in program.adaptation.attachments:
            values = {n: program.binding.values[f] for n, f in a.slots.items()}
            if a.adapter == "prompt":
                for t in values.values():
                    t.copy_(torch.randn_like(t))
                slots[a.key] = values["adaption_prompt"], values["adaption_gate"]
            else:
                scale = program.binding.values[a.scale_slot]  # type: ignore[index]
                model.get_submodule(a.module).weight += scale * values["lora_B.weight"] @ values["lora_A.weight"]
    with with_adaption_prompts(model, slots):
        expected = logits(model, padded())
    same(logits(program, padded()), expected)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    same(logits(loaded, padded()), expected)
    program.set_active(["task"])
    same(logits(program, padded()), logits(model, padded()))


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generating(name: str, tmp_path: Path) -> None:
    one, two = wrapped(built(name)), wrapped(built(name), 6, **OTHER)
    one.save_pretrained(str(tmp_path / "one"))
    two.save_pretrained(str(tmp_path / "two"))
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generator = adaptc.compile_for_generation(built(name), tmp_path / "one", max_length=32, max_batch=4)
    for path, theirs in (("one", one), ("two", two)):
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(generator, tmp_path / path)
            found = generator.generate(ids(), **how)
        with quiet():
            expected = theirs.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), **how)
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_inductor_and_packages(tmp_path: Path) -> None:
    one, two = wrapped(built("llama")), wrapped(built("llama"), 6, adapter_len=3)
    one.save_pretrained(str(tmp_path / "one"))
    two.save_pretrained(str(tmp_path / "two"))
    program = adaptc.compile(built("llama"), tmp_path / "one", backend="inductor")
    same(logits(program, padded()), logits(one, padded()))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, tmp_path / "two")
        same(logits(program, padded()), logits(two, padded()))
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "package.pt2"))
    same(logits(runner, padded()), logits(two, padded()))
    with pytest.raises(adaptc.SwapError, match=r"\(1, 5, 24\), and the compiled code takes \(1, 3, 24\) alone"):
        runner.swap(tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_len": 5}, "adapter_layers must be given"),
        ({"adapter_layers": 2}, "adapter_len must be given"),
        ({"adapter_len": 0, "adapter_layers": 2}, "adapter_len must be a positive integer"),
        ({"adapter_len": 5, "adapter_layers": 4}, "adapter_layers=4, and 'self_attn' is the name of 3"),
        ({"adapter_len": 5, "adapter_layers": 2, "target_modules": "self_atn"}, "'self_atn' is the name of no module"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=message):
        adaptc.compile(plain("llama"), AdaptionPromptConfig(**options))


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "an encoder and a decoder"),
        ("mamba", "no attention in the program itself is understood: looked for scaled_dot_product_attention"),
    ],
)
def test_models_without_such_attentions_are_refused(name: str, message: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(adaptc.TargetError, match=f"ADAPTION_PROMPT.*{message}"):
        adaptc.compile(family.build(), AdaptionPromptConfig(**OPTIONS), example_inputs=family.inputs(2, 6))


@pytest.mark.long
def test_what_no_weight_can_hold_is_refused(tmp_path: Path) -> None:
    program = adaptc.compile(plain("llama"), AdaptionPromptConfig(**OPTIONS))
    with pytest.raises(adaptc.MergeError, match="adaption_prompt attends to tokens of its own"):
        adaptc.merge(program)
    with pytest.raises(adaptc.TargetError, match="another adapter for each row"):
        program.bank({})
    with pytest.raises(adaptc.AdaptcError, match="ADAPTION_PROMPT changes no weight"):
        adaptc.convert_to_lora(program, rank=3)
