"""Prompt tuning next to PEFT's: outputs, losses, gradients, files, and first values; and what can go wrong."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig, PromptTuningConfig
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, MergeError, SwapError, TargetError
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    load_peft,
    quiet,
    shared_base_program,
)
from tests.support.prompts import PROMPT_WARNINGS, check_saved_program, labels, prompt_oracle, run_quietly, text

NAMES = ["llama", "gpt2", "qwen3", "mistral"]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["right", "left", None])
def test_outputs(name, padding, tmp_path):
    oracle = prompt_oracle(name, tmp_path, num_virtual_tokens=5)
    program = adaptc.compile(shared_base_program(name), tmp_path)
    program.validate()
    for batch, length in ((3, 11), (1, 7), (2, 3)):
        inputs = text(batch, length, padding)
        expected = run_quietly(oracle.model, inputs)
        assert expected.logits.shape == (batch, 5 + length, VOCAB)
        assert_same(run_quietly(program, inputs), expected)
    assert_same(run_quietly(adaptc.unload(program), text(3, 11)), run_quietly(FAMILIES[name].build(), text(3, 11)))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_training(name, tmp_path):
    """Losses and gradients with labels, all parameters that train, and files both ways."""
    oracle = prompt_oracle(name, tmp_path / "peft", num_virtual_tokens=5)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with quiet(*PROMPT_WARNINGS):
        oracle.check_trained(adaptc.compile(FAMILIES[name].build(), config), tmp_path / "ours")
    module = oracle.module_with_peft_values(adaptc.compile(FAMILIES[name].build(), config, training=True)).eval()
    inputs = text(3, 11)
    inputs["labels"] = labels(inputs)
    got, want = module(**inputs), oracle.model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    ours, theirs = gradients(module, got), gradients(oracle.model, want)
    assert_same_gradients(ours, theirs)
    stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
    assert {**stored[0], "inference_mode": True} == stored[1]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_to_other_numbers_of_tokens(backend, tmp_path):
    """From a directory, a state dict and a binding; one token, and the base, are numbers as all others."""
    family = FAMILIES["llama"]
    program = adaptc.compile(shared_base_program("llama"), PromptTuningConfig(num_virtual_tokens=3), backend=backend)
    oracles = {n: prompt_oracle("llama", tmp_path / str(n), num_virtual_tokens=n, seed=n) for n in (1, 2, 7, 13)}
    run_quietly(program, text(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for n, oracle in oracles.items():
            adaptc.swap(program, oracle.path)
            for size in ((3, 11), (1, 2)):
                assert_same(run_quietly(program, text(*size)), run_quietly(oracle.model, text(*size)))
            bound = program.bind(file_tensors(oracle.path))
            assert bound.binding.config.num_virtual_tokens == n
            assert_same(run_quietly(bound, text(3, 7)), run_quietly(oracle.model, text(3, 7)))
    assert_same(run_quietly(program.bind(None), text(3, 7)), run_quietly(family.build(), text(3, 7)))
    assert adaptc.verify(program, family.build()).ok
    program.validate()


@pytest.mark.long
def test_saved_programs(tmp_path):
    one, other = (prompt_oracle("gpt2", tmp_path / str(n), num_virtual_tokens=n) for n in (3, 8))
    check_saved_program(one, other, text(3, 5), tmp_path)


@pytest.mark.slow
def test_packages(tmp_path):
    one, other, longer = (
        prompt_oracle("llama", tmp_path / f"{n}{s}", num_virtual_tokens=n, seed=s) for n, s in ((5, 0), (5, 1), (6, 0))
    )
    program = adaptc.compile(shared_base_program("llama"), one.path)
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "package.pt2"))
    assert_same(run_quietly(runner, text(3, 11)), run_quietly(one.model, text(3, 11)))
    runner.swap(other.path)
    assert_same(run_quietly(runner, text(2, 3)), run_quietly(other.model, text(2, 3)))
    with pytest.raises(SwapError, match=r"shape \(6, 24\), and the compiled code takes \(5, 24\) alone"):
        runner.swap(longer.path)
    assert_same(run_quietly(runner, text(2, 3)), run_quietly(other.model, text(2, 3)))


def test_reports_and_refusals():
    program = adaptc.compile(shared_base_program("llama"), PromptTuningConfig(num_virtual_tokens=5))
    report = str(adaptc.report(program))
    assert "model.embed_tokens" in report
    assert "prompt_embeddings 5x24" in report
    with pytest.raises(MergeError, match="prompt_tuning changes what the program reads"):
        adaptc.merge(program)
    with pytest.raises(SwapError, match=r"lora_A.weight|sites"):
        adaptc.swap(program, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(3, 24)})
    with pytest.raises(CheckpointError, match=r"prompt_embeddings.*\(5, 23\)"):
        adaptc.swap(program, {"prompt_embeddings": torch.zeros(5, 23)})


class _Tokenizer:
    """A tokenizer of words, in a directory."""

    def __init__(self, path) -> None:
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {f"w{i}": i for i in range(VOCAB)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w3").save_pretrained(str(path))


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3, 7])
def test_first_values_of_a_text(count, tmp_path):
    """Repeated or cut to the number of tokens, as PEFT does."""
    _Tokenizer(tmp_path)
    config = {
        "num_virtual_tokens": count,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "w9 w40 w7",
        "tokenizer_name_or_path": str(tmp_path),
    }
    with quiet(*PROMPT_WARNINGS):
        theirs = peft.get_peft_model(
            FAMILIES["llama"].build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", **config)
        )
    program = adaptc.compile(shared_base_program("llama"), PromptTuningConfig(task_type="CAUSAL_LM", **config))
    (ours,) = program.binding.values.values()
    assert torch.equal(ours, theirs.prompt_encoder["default"].embedding.weight)
    # Files say how the rows began, and nobody needs the tokenizer to read them.
    saved = adaptc.save_adapter(program, tmp_path / "saved")
    (tmp_path / "tokenizer.json").unlink()
    again = adaptc.compile(shared_base_program("llama"), saved)
    assert torch.equal(next(iter(again.binding.values.values())), ours)
    with pytest.raises(ConfigError, match="tokenizer_name_or_path"):
        adaptc.compile(shared_base_program("llama"), PromptTuningConfig(**config))


@pytest.mark.long
def test_first_values_by_chance():
    """Rows of the vocabulary, or normal numbers; the same for the same generator."""
    table = shared_base_program("llama").state_dict["model.embed_tokens.weight"]
    found = []
    for scheme in ("SAMPLE_VOCAB", "SAMPLE_VOCAB", "RANDOM"):
        config = PromptTuningConfig(num_virtual_tokens=300, prompt_tuning_init=scheme)
        program = adaptc.compile(shared_base_program("llama"), config, generator=torch.Generator().manual_seed(3))
        found.append(next(iter(program.binding.values.values())).detach())
    assert torch.equal(found[0], found[1])
    rows = [(row == table).all(1).nonzero() for row in found[0]]
    assert all(len(r) == 1 for r in rows)
    assert len({int(r) for r in rows}) > 40
    assert abs(float(found[2].std()) - 1) < 0.03
    assert abs(float(found[2].mean())) < 4 / math.sqrt(300 * 24)


@pytest.mark.long
def test_beside_lora(tmp_path):
    """Prompt tuning and LoRA act together; LoRA sees virtual tokens as all others, and not at their lookup."""
    family = FAMILIES["llama"]
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    with quiet(*PROMPT_WARNINGS, ".*embedding layers.*"):
        Oracle.wrap_and_save("llama", lora, tmp_path / "lora")
        wrapped = load_peft(family.build(), tmp_path / "lora")
        prompt = prompt_oracle("llama", tmp_path / "prompt", num_virtual_tokens=5)
    program = adaptc.compile(shared_base_program("llama"), {"style": tmp_path / "lora", "task": prompt.path})
    inputs = text(3, 7)
    rows = prompt.model.prompt_encoder["default"].embedding.weight
    table = wrapped.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.cat([rows.expand(3, -1, -1), table], 1)
    mask = nn.functional.pad(inputs["attention_mask"], (5, 0), value=1)
    expected = run_quietly(wrapped, {"inputs_embeds": embeds, "attention_mask": mask})
    assert_same(run_quietly(program, inputs), expected)
    assert_differs(expected, run_quietly(prompt.model, inputs))
    adaptc.swap(program, {"task": None})
    assert_same(run_quietly(program, inputs), run_quietly(wrapped, inputs))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(31, 12), nn.Linear(12, 7)

    def forward(self, ids, more=None):
        y = self.table(ids)
        return self.out(y if more is None else y * more[:, :, None])


class Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(31, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.out(self.table(x.argmax(-1)))


def test_no_place():
    """What the program lacks is named, and what it has instead."""
    config = PromptTuningConfig(num_virtual_tokens=3)
    ids = torch.arange(15).reshape(3, 5)
    program = adaptc.compile(Ids(), config, example_inputs=(ids,))
    assert program(ids[:2]).shape == (2, 8, 7)
    with pytest.raises(TargetError, match=r"no token embedding was found.*no lookup by an input"):
        adaptc.compile(Floats(), config, example_inputs=(torch.randn(3, 5, 31),))
    with pytest.raises(TargetError, match="exactly 5 tokens in 'ids'"):
        adaptc.compile(Ids(), config, example_inputs=(ids,), dynamic_shapes=None)
    with pytest.raises(TargetError, match=r"'more' .* is as long as the tokens"):
        adaptc.compile(Ids(), config, example_inputs=(ids, torch.randn(3, 5)))
    with pytest.raises(ConfigError, match=r"token_dim=13.*rows of 12"):
        adaptc.compile(Ids(), config.replace(token_dim=13), example_inputs=(ids,))


@pytest.mark.long
def test_more_tokens_than_positions(tmp_path):
    """At compile where the model says how many it takes, else in the call; the next call is as before."""
    bert = shared_base_program("bert")
    with pytest.raises(ConfigError, match=r"num_virtual_tokens=64 leaves no room.*64 in all"):
        adaptc.compile(bert, PromptTuningConfig(num_virtual_tokens=64))
    program = adaptc.compile(bert, PromptTuningConfig(num_virtual_tokens=50))
    with pytest.raises(AdaptcError, match=r"size 15 and the adapter puts 50 tokens in front.*14 tokens at most"):
        program(**text(2, 15))
    assert program(**text(2, 14)).logits.shape == (2, 64, VOCAB)
    gpt2 = adaptc.compile(shared_base_program("gpt2"), PromptTuningConfig(num_virtual_tokens=50))
    with pytest.raises(AdaptcError, match="50 tokens in front"):
        gpt2(**text(2, 15))
    assert gpt2(**text(2, 14)).logits.shape == (2, 64, VOCAB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_virtual_tokens must say"),
        ({"num_virtual_tokens": 0}, "positive integer"),
        ({"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path"),
        ({"num_virtual_tokens": 3, "tokenizer_kwargs": {"a": 1}}, "is for prompt_tuning_init='TEXT'"),
        ({"num_virtual_tokens": 3, "prompt_tuning_init": "WORDS"}, "prompt_tuning_init"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptTuningConfig(**options)


def test_lora_programs_refuse_prompts(tmp_path):
    oracle = prompt_oracle("llama", tmp_path, num_virtual_tokens=5)
    program = adaptc.compile(shared_base_program("llama"), LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(SwapError, match="prompt_embeddings"):
        adaptc.swap(program, oracle.path)


@pytest.mark.long
def test_as_many_tokens_as_a_table_of_positions_leaves_room_for():
    """BERT cuts positions from a buffer of fixed length; the capture's example with so many tokens goes beyond it."""
    model = FAMILIES["bert"].build()
    for first in (5, 63):
        program = adaptc.compile(shared_base_program("bert"), PromptTuningConfig(num_virtual_tokens=first))
        for count in (59, 63, 1):
            rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(count))
            adaptc.swap(program, {"prompt_embeddings": rows})
            program.validate()
            for length in (1, 64 - count):
                inputs = text(2, length, None)
                table = model.get_input_embeddings()(inputs["input_ids"])
                expected = run_quietly(model, {"inputs_embeds": torch.cat([rows.expand(2, -1, -1), table], 1)}).logits
                assert_same(run_quietly(program, inputs).logits, expected)
        with pytest.raises(AdaptcError, match="Give 63 tokens at most, or an adapter of fewer"):
            run_quietly(program, text(2, 64, None))
