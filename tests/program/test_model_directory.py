"""A merged model as transformers knows it: ``from_pretrained`` loads what is written, and it is what PEFT writes."""

from __future__ import annotations

import copy
import json
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError, LoraConfig
from adaptc.adapter_files import atomic_write
from tests.support.families import FAMILIES
from tests.support.oracle import TARGETS, quiet

pytestmark = pytest.mark.usefixtures("no_progress_bars")

CAUSAL = transformers.AutoModelForCausalLM
#: family -> the class by which plain transformers loads it
AUTO = {
    "llama": CAUSAL,
    "gpt2": CAUSAL,
    "mixtral": CAUSAL,
    "bert": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "vit": transformers.AutoModelForImageClassification,
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
IDS = torch.arange(14).reshape(2, 7)


def llama(kind: Any = transformers.LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**{**SIZES, "pad_token_id": 0, **more})).eval()


def merged(model: nn.Module, targets: Any, **more: Any) -> tuple[adaptc.AdaptedProgram, adaptc.AdaptedProgram]:
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **more)
    prog = adaptc.compile(model, config)
    return prog, adaptc.merge(prog)


@cache
def usual() -> tuple[adaptc.AdaptedProgram, adaptc.AdaptedProgram]:
    """An adapted and a merged program, which nobody changes."""
    return merged(llama(), ["q_proj"])


def loaded(auto: Any, path: Path) -> Any:
    model, found = auto.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


@torch.no_grad()
def same(model: nn.Module, program: Any, inputs: dict[str, Tensor]) -> None:
    got, wanted = model(**inputs)[0], program(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def peft_writes(model: nn.Module, adapter: Path, path: Path) -> None:
    with quiet(".*[Tt]ied .*", ".*tie_word_embeddings.*", "fan_in_fan_out is set to False.*"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
        theirs.merge_and_unload().save_pretrained(path)


@pytest.mark.long
@pytest.mark.parametrize("name", AUTO)
def test_transformers_loads_it_as_what_peft_writes(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "base")  # whose keys files have, of experts too
    model = loaded(AUTO[name], tmp_path / "base")
    experts = {"target_parameters": ["mlp.experts.down_proj"]} if name == "mixtral" else {}
    prog, made = merged(model, TARGETS.get(name, "all-linear"), **experts)
    made.module().save_pretrained(tmp_path / "ours")
    same(loaded(AUTO[name], tmp_path / "ours"), made, family.inputs(2, 7))

    adaptc.save_adapter(prog, tmp_path / "adapter")
    peft_writes(model, tmp_path / "adapter", tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        torch.testing.assert_close(ours[key], t, rtol=1e-4, atol=1e-5)
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0] == configs[1]
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}


@pytest.mark.long
def test_a_head_that_was_trained(tmp_path: Path) -> None:
    model = llama(transformers.LlamaForSequenceClassification, num_labels=3)
    prog, made = merged(model, ["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    with torch.no_grad():
        prog.binding.values[next(k for k in prog.binding.values if "score" in k)].add_(1.0)
    made = adaptc.merge(prog)
    made.module().save_pretrained(tmp_path)
    found = loaded(transformers.AutoModelForSequenceClassification, tmp_path)
    assert not torch.allclose(found.score.weight, model.score.weight)
    same(found, made, {"input_ids": IDS})


@pytest.mark.long
def test_a_vocabulary_that_was_resized_and_trained(tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(67, mean_resizing=False)
    _, made = merged(model, ["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    made.module().save_pretrained(tmp_path)
    found = loaded(CAUSAL, tmp_path)
    assert found.config.vocab_size == found.lm_head.out_features == 67
    same(found, made, {"input_ids": IDS + 52})


@pytest.mark.long
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["q_proj", "lm_head"]])
def test_tied_weights_stay_tied_unless_an_adapter_parts_them(targets: list[str], tmp_path: Path) -> None:
    with quiet(".*[Tt]ied .*", ".*tie_word_embeddings.*"):
        _, made = merged(llama(tie_word_embeddings=True), targets)
    made.module().save_pretrained(tmp_path)
    found = loaded(CAUSAL, tmp_path)
    tied = targets == ["q_proj"]
    assert found.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    same(found, made, {"input_ids": IDS})


@pytest.mark.long
def test_after_calls_have_moved_weights_into_one_buffer(tmp_path: Path) -> None:
    made = usual()[1].with_binding(None)
    made.fuse = True
    made(input_ids=IDS)
    made.module().save_pretrained(tmp_path)
    same(loaded(CAUSAL, tmp_path), made, {"input_ids": IDS})


@pytest.mark.long
def test_layers_that_repeat_one_another_have_weights_each(tmp_path: Path) -> None:
    _, made = merged(llama(), ["q_proj"], layer_replication=[(0, 2), (1, 2)])
    made.module().save_pretrained(tmp_path)
    found = loaded(CAUSAL, tmp_path)
    assert found.config.num_hidden_layers == 3
    same(found, made, {"input_ids": IDS})


@pytest.mark.long
def test_shards_dtype_and_what_was_there_before(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-00001-of-00009.safetensors", "pytorch_model.bin", "notes.txt"):
        (tmp_path / name).write_text("old")
    module = copy.deepcopy(usual()[1].module()).to(torch.bfloat16)
    module.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {p.name for p in tmp_path.glob("*.safetensors")}
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    assert not (tmp_path / "pytorch_model.bin").exists()
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    found = CAUSAL.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(t.dtype is torch.bfloat16 and torch.equal(t, found[k]) for k, t in module.state_dict().items())
    module.save_pretrained(tmp_path)  # in one file again
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_state_dicts_of_merged_modules_are_the_model(tmp_path: Path) -> None:
    module = usual()[1].module()
    state = module.state_dict()
    assert state.keys() == llama().state_dict().keys()
    doubled = {k: 2 * t for k, t in state.items()}
    module.save_pretrained(tmp_path, state_dict=doubled)
    for key, t in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(t, doubled[key])
    with pytest.raises(CheckpointError, match="Missing key"):
        module.load_state_dict({})


@pytest.mark.long
def test_of_an_unloaded_program_and_a_copied_module(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    prog, _ = merged(loaded(CAUSAL, tmp_path / "base"), ["q_proj"])
    for i, module in enumerate(
        (adaptc.unload(prog).module(), pickle.loads(pickle.dumps(adaptc.unload(prog).module())))
    ):
        module.save_pretrained(tmp_path / str(i))
        same(loaded(CAUSAL, tmp_path / str(i)), model, {"input_ids": IDS})


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_of_what_generates(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    gen = adaptc.compile_for_generation(model, config, max_batch=2, max_length=16)
    with pytest.raises(AdaptcError, match="has an adapter: merge it first"):
        gen.save_pretrained(tmp_path / "none")
    made: Any = adaptc.merge(gen)  # pyright: ignore
    made.save_pretrained(tmp_path / "ours", max_shard_size="1GB")
    with pytest.raises(ConfigError, match="takes no variant"):
        made.save_pretrained(tmp_path / "none", variant="fp16")
    found, text = loaded(AUTO[name], tmp_path / "ours"), {"input_ids": IDS[:, 4:], "max_new_tokens": 5}
    assert torch.equal(found.generate(**text, do_sample=False), made.generate(**text, do_sample=False))
    assert not (tmp_path / "none").exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_options_that_a_model_is_not_written_with(tmp_path: Path) -> None:
    prog, made = usual()
    module = made.module()
    for odd in (
        {"safe_serialization": False},
        {"variant": "x"},
        {"save_embedding_layers": True},
        {"push_to_hub": True},
    ):
        with pytest.raises(ConfigError, match=next(iter(odd))):
            module.save_pretrained(tmp_path / "m", **odd)
    with pytest.raises(ConfigError, match=r"max_shard_size; adaptc.merge\(program\).module"):
        prog.module().save_pretrained(tmp_path / "m", max_shard_size="1GB")
    module.save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.long
def test_a_class_without_a_place_for_a_weight(tmp_path: Path) -> None:
    with quiet("`lora_bias=True`.*"):
        _, made = merged(llama(), ["q_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match=r"no place for 'model.layers.0.self_attn.q_proj.bias'"):
        made.module().save_pretrained(tmp_path / "m")
    state = {k: t for k, t in usual()[1].module().state_dict().items() if k != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"needs 'lm_head.weight'"):
        made.module().save_pretrained(tmp_path / "m", state_dict=state)
    changed = llama()
    changed.lm_head = nn.Linear(24, 50, bias=False)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is \(50, 24\).*\(61, 24\)"):
        merged(changed, ["q_proj"])[1].module().save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.long
def test_encoders_and_decoders_that_share_what_an_adapter_parts(tmp_path: Path) -> None:
    with quiet(".*[Tt]ied .*", ".*tie_word_embeddings.*"):
        _, made = merged(FAMILIES["t5"].build(), r"decoder\.embed_tokens")
    with pytest.raises(CheckpointError, match=r"T5ForConditionalGeneration always ties '.*' to 'shared.weight'"):
        made.module().save_pretrained(tmp_path / "m")


@pytest.mark.long
@pytest.mark.parametrize("kind", [adaptc.PromptTuningConfig, adaptc.PrefixTuningConfig, adaptc.CPTConfig])
def test_what_is_no_weight_is_no_merged_model(kind: Any) -> None:
    more: dict[str, Any] = {"cpt_token_ids": [1, 2, 3]} if kind is adaptc.CPTConfig else {"num_virtual_tokens": 3}
    prog = adaptc.compile(llama(), kind(task_type="CAUSAL_LM", **more))
    with pytest.raises(adaptc.MergeError, match=r"cannot be merged: .* which no weight can hold"):
        adaptc.merge(prog)


def test_an_adapter_and_a_model_do_not_share_a_directory(tmp_path: Path) -> None:
    """transformers takes a directory with both for the adapter, of a model that is not in it."""
    prog, made = usual()
    made.module().save_pretrained(tmp_path / "model")
    adaptc.save_adapter(prog, tmp_path / "adapter")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for write in (lambda p: adaptc.save_adapter(prog, p), lambda p: prog.module().save_pretrained(p)):
        with pytest.raises(CheckpointError, match=r"it holds a model|not this adapter's"):
            write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="it holds an adapter"):
        made.module().save_pretrained(tmp_path / "adapter")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("fails_at", ["config.json", "-00002-"])
def test_a_write_that_fails_leaves_the_old_model(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prog, first = usual()
    first.module().save_pretrained(tmp_path)
    module = adaptc.unload(prog).module()
    put = atomic_write.move_file

    def full(new: Path, target: Path) -> None:
        if fails_at in target.name:
            raise OSError(28, os.strerror(28))
        put(new, target)

    monkeypatch.setattr(atomic_write, "move_file", full)
    with pytest.raises(CheckpointError, match="What was there before is unchanged"):
        module.save_pretrained(tmp_path, max_shard_size="10KB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    same(loaded(CAUSAL, tmp_path), first, {"input_ids": IDS})


@pytest.mark.long
def test_quantised_weights_are_refused_and_plain_ones_are_written(tmp_path: Path) -> None:
    """A config that speaks of quantised weights does so no more where an adapter's merge made all of them plain."""
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    model = adaptc.quantize(llama(num_hidden_layers=1), "int8", target_modules=["q_proj"])
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    prog = adaptc.compile(model, config)
    for way in ({"requantize": True}, {"keep": "residual"}):
        with pytest.raises(CheckpointError, match=r"q_proj.weight' and 0 more .*adaptc\.merge_directory"):
            adaptc.merge(prog, **way).module().save_pretrained(tmp_path / "m")
        assert not (tmp_path / "m").exists()
    adaptc.merge(prog, dequantize=True).module().save_pretrained(tmp_path / "m")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(found(input_ids=IDS).logits, prog(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.config.quantization_config["load_in_8bit"]
