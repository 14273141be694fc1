"""Targets that mean the experts and the router of a mixture: the same sites as PEFT's, and files both ways."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import adaptc
from adaptc.targets.expert_targets import OLD_LAYERS

#: a tiny mixture of any type: each takes the sizes that it knows
SIZES: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 41,
    "num_local_experts": 3,
    "num_experts": 3,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
#: types with other routers, with dense layers first, and with shared experts
FAMILIES = ["mixtral", "qwen3_moe", "hunyuan_v1_moe", "deepseek_v3", "ernie4_5_moe"]
OTHERS = ["minimax", "deepseek_v2", "glm4_moe", "olmoe", "flex_olmo", "afmoe", "solar_open", "exaone_moe"]
#: PEFT writes this rank itself, and its check of the patterns knows no parameters
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


def build(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    # A norm in OLMoE goes over all heads, and takes the hidden size.
    config = AutoConfig.for_model(model_type, **{**SIZES, **({"hidden_size": 16} if model_type == "olmoe" else {})})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def tokens(count: int = 2) -> Tensor:
    return torch.randint(2, 41, (count, 7), generator=torch.Generator().manual_seed(count))


def compile_quietly(model: nn.Module, config: Any, **options: Any) -> adaptc.AdaptedProgram:
    """Without the warning of layers that are not adapted, as PEFT says nothing of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_modules: in a model of type", category=adaptc.AdaptcWarning)
        return adaptc.compile(model, config, example_inputs={"input_ids": tokens(3)}, **options)


def in_peft(model: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"init_lora_weights": False, **options})).eval()


def sites(program: adaptc.AdaptedProgram) -> dict[str, int | None]:
    return {a.fqn: a.method.sizes.rank() for a in program.adaptation.attachments}


def test_all_linear_is_what_peft_adapts(tmp_path: Path) -> None:
    check_all_linear("mixtral", tmp_path)


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("model_type", [*FAMILIES[1:], *OTHERS])
def test_all_linear_of_other_types(model_type: str, tmp_path: Path) -> None:
    check_all_linear(model_type, tmp_path)


def check_all_linear(model_type: str, tmp_path: Path) -> None:
    model, options = build(model_type), {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    theirs = in_peft(model, **options)
    program = compile_quietly(model, adaptc.LoraConfig(**options))
    scales = [program.binding.values[a.scale_slot] for a in program.adaptation.attachments if a.scale_slot is not None]
    assert {round(float(s), 5) for s in scales} == {round(5 / 3, 5)}
    theirs.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any("experts" in key for key in expected)
    fresh = load_file(adaptc.save_adapter(program, tmp_path / "fresh") / "adapter_model.safetensors")
    assert {k: t.shape for k, t in fresh.items()} == {k: t.shape for k, t in expected.items()}
    ids = tokens()
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adaptc.swap(program, tmp_path / "theirs")
        found, want = program(input_ids=ids).logits, theirs(input_ids=ids).logits
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        assert float((want - base).abs().max()) > 1e-2
        adaptc.save_adapter(program, tmp_path / "ours")
        ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in expected.items()}
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
        torch.testing.assert_close(read(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


def test_the_types_are_those_that_peft_converts() -> None:
    theirs = conversion._MODEL_TO_CONVERSION_PATTERN
    known = {t: conversion._MOE_TARGET_MODULE_MAPPING.get(base) for t, base in theirs.items()}
    # Classes of models stand in this table, too; ours has types of configs.
    assert {t: m for t, m in known.items() if m and t == t.lower()} == OLD_LAYERS


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["q_proj", "w1", "w3", "w2"], marks=pytest.mark.long),
        pytest.param(["gate"], marks=pytest.mark.long),
        pytest.param(["experts.w2", "v_proj"], marks=pytest.mark.long),
    ],
)
def test_names_of_single_layers(targets: list[str]) -> None:
    model, options = build("mixtral"), {"r": 3, "lora_alpha": 5}
    theirs = in_peft(model, **options, target_modules=targets)
    config = adaptc.LoraConfig(**options, target_modules=list(targets))
    program = adaptc.compile(model, config, example_inputs={"input_ids": tokens(3)})
    keys = {k.partition(".lora_")[0] for k in peft.get_peft_model_state_dict(theirs)}
    assert {f"base_model.model.{a.key}" for a in program.adaptation.attachments} == keys
    assert config.target_modules == targets
    assert config.target_parameters is None


@pytest.mark.long
def test_projections_in_one_parameter_have_twice_the_rank() -> None:
    program = compile_quietly(build("mixtral"), adaptc.LoraConfig(r=3, target_modules=["w1", "w3", "w2", "gate"]))
    mlp = "model.layers.1.mlp"
    found = {f: r for f, r in sites(program).items() if f.startswith(mlp)}
    assert found == {
        f"{mlp}.gate.weight": 3,
        f"{mlp}.experts.gate_up_proj": 6,
        f"{mlp}.experts.down_proj": 3,
    }


@pytest.mark.long
def test_ranks_of_the_users_patterns_count_as_in_peft() -> None:
    """Those for other layers, too; where the pattern is the very one that PEFT writes, PEFT's is taken."""
    model, mlp = build("mixtral"), "model.layers.1.mlp"
    for pattern in (r"1\.mlp\.experts\.gate_up_proj", r".*\.gate_up_proj", "q_proj"):
        options = {"r": 3, "lora_alpha": 5, "target_modules": ["w1", "w3", "q_proj"], "rank_pattern": {pattern: 5}}
        theirs = peft.get_peft_model_state_dict(in_peft(model, **copy.deepcopy(options)))
        program = compile_quietly(model, adaptc.LoraConfig(**options))
        ranks = sites(program)
        assert (
            theirs[f"base_model.model.{mlp}.experts.lora_A.weight"].shape[0] == 3 * ranks[f"{mlp}.experts.gate_up_proj"]
        )
        q_proj = "model.layers.1.self_attn.q_proj"
        assert theirs[f"base_model.model.{q_proj}.lora_A.weight"].shape[0] == ranks[f"{q_proj}.weight"]


@pytest.mark.long
def test_a_projection_without_the_other_is_refused() -> None:
    for targets in (["w1"], ["w3", "w2"], r".*experts\.w1"):
        with pytest.raises(adaptc.ConfigError, match="holds both in one parameter, gate_up_proj"):
            compile_quietly(build("mixtral"), adaptc.LoraConfig(target_modules=targets))


@pytest.mark.long
def test_expressions_mean_the_layers_that_they_match() -> None:
    """PEFT takes the last names of what an expression matches, in all layers."""
    pattern = r"model\.layers\.1\.mlp\.(gate|experts\.(gate|up|down)_proj)|.*layers\.0\.self_attn\.q_proj"
    program = compile_quietly(build("qwen3_moe"), adaptc.LoraConfig(r=3, target_modules=pattern))
    mlp = "model.layers.1.mlp"
    assert sites(program) == {
        "model.layers.0.self_attn.q_proj.weight": 3,
        f"{mlp}.gate.weight": 3,
        f"{mlp}.experts.gate_up_proj": 6,
        f"{mlp}.experts.down_proj": 3,
    }


@pytest.mark.long
def test_layers_of_these_names_beside_the_experts() -> None:
    """A dense first layer and shared experts: PEFT leaves them out, and longer names adapt them."""
    model, short = build("deepseek_v3"), ["gate_proj", "up_proj", "down_proj"]
    inputs = {"input_ids": tokens(3)}
    with pytest.warns(adaptc.AdaptcWarning, match=r"6 linear layers of these names are not adapted: .*layers\.0\.mlp"):
        program = adaptc.compile(model, adaptc.LoraConfig(r=3, target_modules=short), example_inputs=inputs)
    assert set(sites(program)) == {f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    longer = [f"{owner}.{n}" for owner in ("shared_experts", "0.mlp") for n in short]
    program = adaptc.compile(model, adaptc.LoraConfig(r=3, target_modules=[*short, *longer]), example_inputs=inputs)
    assert len(sites(program)) == 8


def test_all_linear_leaves_out_layers_that_are_never_called() -> None:
    """Such as those of a tower whose inputs an example lacks."""
    model = build("qwen3_moe")
    model.model.tower = nn.Linear(20, 20)
    program = compile_quietly(model, adaptc.LoraConfig(r=2, target_modules="all-linear"))
    assert sites(program) == sites(
        compile_quietly(build("qwen3_moe"), adaptc.LoraConfig(r=2, target_modules="all-linear"))
    )
    with pytest.raises(adaptc.TargetError, match="tower"):
        compile_quietly(model, adaptc.LoraConfig(r=2, target_modules=["tower"]))


@pytest.mark.long
def test_types_and_methods_that_peft_does_not_convert() -> None:
    model = build("qwen2_moe")
    program = compile_quietly(model, adaptc.LoraConfig(r=3, target_modules="all-linear"))
    theirs = in_peft(model, r=3, target_modules="all-linear")
    keys = {k.partition(".lora_")[0] for k in peft.get_peft_model_state_dict(theirs)}
    assert {f"base_model.model.{a.key}" for a in program.adaptation.attachments} == keys
    program = compile_quietly(build("mixtral"), adaptc.LoHaConfig(r=3, target_modules="all-linear"))
    assert not any("experts" in fqn for fqn in sites(program))
    with pytest.raises(adaptc.TargetError, match="this model stacks its experts in parameters"):
        compile_quietly(build("mixtral"), adaptc.LoHaConfig(r=3, target_modules=["w1", "w3"]))


@pytest.mark.long
def test_dropout_is_refused_at_experts() -> None:
    config = adaptc.LoraConfig(r=3, lora_dropout=0.1, target_modules="all-linear")
    with pytest.raises(adaptc.ConfigError, match=r"lora_dropout has no meaning at .*experts"):
        compile_quietly(build("mixtral"), config)


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_losses_of_training_are_those_of_peft(model_type: str, tmp_path: Path) -> None:
    model, options = build(model_type), {"r": 3, "target_modules": "all-linear"}
    theirs, ids = in_peft(model, **options), tokens(3)
    theirs.save_pretrained(tmp_path)
    inputs = {"input_ids": ids, "labels": ids}
    program = adaptc.compile(model, adaptc.LoraConfig(**options), example_inputs=inputs, training=True)
    adaptc.swap(program, tmp_path)
    losses: list[list[float]] = []
    for module in (program.module(), theirs):
        module.train()
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(5):
            loss = module(**inputs).loss
            losses[-1].append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 1e-2
