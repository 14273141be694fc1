"""Directories as early releases of PEFT wrote them, against peft's own model of today with the same values.

They have a ``.bin`` file, and a config with the few fields of that time: no ``revision``, no ``peft_version``.
"""

from __future__ import annotations

import json
import re
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adaptc
from adaptc import ConfigError

COMMON = ("base_model_name_or_path", "inference_mode", "peft_type", "task_type")
LORA = (
    *COMMON,
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
)
PROMPT = (*COMMON, "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim")
TARGETS = ["q_proj", "v_proj"]
#: name -> (the config, the fields of PEFT 0.3; of IA3 those of 0.4)
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "lora": (peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS), LORA),
    "lora, one expression": (peft.LoraConfig(r=3, target_modules=r".*\.1\..*(q|v)_proj"), LORA),
    "lora, embedding": (peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"]), LORA),
    "lora, biases of layers": (peft.LoraConfig(r=3, target_modules=TARGETS, bias="lora_only"), LORA),
    "lora, all biases": (peft.LoraConfig(r=3, target_modules=TARGETS, bias="all"), LORA),
    "lora, a whole module": (peft.LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["lm_head"]), LORA),
    "adalora": (
        peft.AdaLoraConfig(target_r=2, init_r=3, total_step=10, target_modules=TARGETS),
        (
            *LORA,
            "beta1",
            "beta2",
            "deltaT",
            "init_r",
            "orth_reg_weight",
            "rank_pattern",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        ),
    ),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        (*COMMON, "fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "modules_to_save", "target_modules"),
    ),
    "prompt tuning": (
        peft.PromptTuningConfig(num_virtual_tokens=3),
        (*PROMPT, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    ),
    "p-tuning": (
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=17),
        (*PROMPT, "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
    ),
    "prefix tuning": (
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        (*PROMPT, "encoder_hidden_size", "prefix_projection"),
    ),
    "prefix tuning, projected": (
        peft.PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=17, prefix_projection=True),
        (*PROMPT, "encoder_hidden_size", "prefix_projection"),
    ),
}
IDS = torch.randint(0, 53, (2, 5), generator=torch.Generator().manual_seed(3))


def model() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.LlamaConfig(vocab_size=53, max_position_embeddings=40, attention_bias=True, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def adapted(config: Any) -> Any:
    """peft's model, whose adapter has random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(), type(config)(**{**config.to_dict(), "task_type": "CAUSAL_LM"}))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 4)
    return made.eval()


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, set) else value


def write_as_then(made: Any, fields: tuple[str, ...], folder: Path, more: dict[str, Any] | None = None) -> Path:
    """Write what a release of that time wrote. A layer with an adapter was no wrapper, so its bias had no other key."""
    config = made.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": "tiny"}
    said = {f: plain(config[f]) for f in fields} | (more or {})
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True))
    tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    torch.save({k.replace(".base_layer.bias", ".bias"): t for k, t in tensors.items()}, folder / "adapter_model.bin")
    return folder


@torch.no_grad()
def check(folder: Path, made: Any) -> adaptc.AdaptedProgram:
    program = adaptc.compile(model(), folder, example_inputs={"input_ids": IDS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft passes transformers a cache by the name that it had
        wanted = made(input_ids=IDS).logits
    torch.testing.assert_close(program(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    with_virtual = wanted.shape[1] != IDS.shape[1]
    assert with_virtual or (wanted - model()(input_ids=IDS).logits).abs().max() > 1e-3, "the adapter does nothing"
    return program


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_means_what_it_meant(kind: str, tmp_path: Path) -> None:
    config, fields = KINDS[kind]
    made = adapted(config)
    check(write_as_then(made, fields, tmp_path), made)


@pytest.mark.long
def test_biases_of_that_time_are_swapped_and_written_with_todays_keys(tmp_path: Path) -> None:
    config, fields = KINDS["lora, all biases"]
    made = adapted(config)
    folder = write_as_then(made, fields, tmp_path)
    names = set(torch.load(folder / "adapter_model.bin"))
    assert any(n.endswith("q_proj.bias") for n in names)
    program = check(folder, made)
    adaptc.swap(program, folder)
    adaptc.save_adapter(program, tmp_path / "new")
    check(tmp_path / "new", made)
    theirs = peft.PeftModel.from_pretrained(model(), str(tmp_path / "new")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, made(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


def test_fields_of_still_older_releases(tmp_path: Path) -> None:
    config, fields = KINDS["lora"]
    made = adapted(config)
    check(write_as_then(made, fields, tmp_path, {"enable_lora": None, "merge_weights": False}), made)
    write_as_then(made, fields, tmp_path, {"enable_lora": [True, False, True], "merge_weights": False})
    with pytest.raises(ConfigError, match=re.escape("enable_lora=[True, False, True] is of PEFT 0.2 or older")):
        adaptc.compile(model(), tmp_path, example_inputs={"input_ids": IDS})
