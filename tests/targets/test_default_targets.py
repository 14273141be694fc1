"""Default targets of real architectures, next to PEFT's table of default targets.

The table is PEFT's own, read at run time: where the graph and the table agree nothing is written here but the names,
and where they do not, the reason is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.passes.analysis.attention.attention_targets import default_targets
from tests.support.families import FAMILIES

QV = ["q_proj", "v_proj"]
QUERY_VALUE = ["query", "value"]
Q_V = ["q", "v"]
C_ATTN = ["c_attn"]
FUSED = ["query_key_value"]
NONE: list[str] = []

#: families whose attention is found under other names than the usual ``q_proj`` and ``v_proj``
OTHER_NAMES: dict[str, list[str]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "albert"), QUERY_VALUE),
    **dict.fromkeys(("t5", "mpnet"), Q_V),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), C_ATTN),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), FUSED),
    "phi3": ["qkv_proj"],
    "modernbert": ["Wqkv"],
    "distilbert": ["q_lin", "v_lin"],
    "deberta_v2": ["query_proj", "value_proj"],
    # Its pooling head is an nn.MultiheadAttention, which owns its projection weights: the module is the target.
    "siglip_vision": [*QV, "attention"],
    # No attention.
    **dict.fromkeys(("mamba", "resnet", "convnext"), NONE),
}

#: model type -> why the names are not those of PEFT's table
DIFFERS = {
    "phi": "PEFT adds fc1 and fc2, the feed-forward layers; for no other type does its table do so",
    "nemotron_h": "PEFT lists all four attention projections for this type alone",
    "gemma4_text": "PEFT's entry is a pattern for the whole multimodal model; the names in it are these",
    "rwkv": "no attention: PEFT's entry names the projections of its recurrence",
    "blip-2": "PEFT lists both possible language models and leaves the vision and query towers out",
}


def export(model: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    with torch.no_grad():
        return torch.export.export(model, (), inputs, strict=False)


def differences(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """In what the targets that are found differ from those of this file, and from PEFT's where no reason is written."""
    found = default_targets(export(model, inputs))
    names = OTHER_NAMES.get(name, QV)
    if name == "dinov2" and not any(path.endswith(".q_proj") for path, _ in model.named_modules()):
        names = QUERY_VALUE  # transformers renamed these layers
    out = [] if found == names else [f"found {found}, and here are {names}"]
    model_type = model.config.model_type  # type: ignore[union-attr]
    entry = PEFT.get(model_type, PEFT.get(model_type.removesuffix("_text")))
    if entry is not None and (found == entry) == (model_type in DIFFERS):
        out.append(f"found {found}, and PEFT has {entry}")
    return out


@pytest.mark.few(7)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    family = FAMILIES[name]
    assert differences(name, family.build(), family.inputs(2, 7)) == []


_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": 61, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
_T5 = {"vocab_size": 61, "d_model": 24, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 40, "pad_token_id": 0}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
_LATENT = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}

#: further types of PEFT's table, and mechanisms that no family has: (model class, config class, config, names)
MORE: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5, Q_V),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _SIZES, QUERY_VALUE),
    "layoutlm": ("LayoutLMModel", "LayoutLMConfig", _SIZES, QUERY_VALUE),
    "deberta": (
        "DebertaModel",
        "DebertaConfig",
        {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
        ["in_proj"],
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 24, "n_layers": 1, "n_heads": 4, "vocab_size": 61}, ["Wqkv"]),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", _GPT, ["qkv_proj"]),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**_GROUPED, "num_local_experts": 2}, QV),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {**_GROUPED, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 4, "num_hidden_layers": 2},
        QV,
    ),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", {**_GROUPED, **_MAMBA, "hidden_size": 32}, QV),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 61, "hidden_size": 24, "attention_hidden_size": 24, "num_hidden_layers": 2},
        NONE,
    ),
    # Query and key-value projections through a low rank: the nearest ones are the second halves.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_SIZES, **_LATENT, **_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 8, "first_k_dense_replace": 0},
        ["q_b_proj", "kv_b_proj"],
    ),
    # Sinks in the softmax, and experts behind a second one.
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
        QV,
    ),
    # Projections that are bare parameters of the attention module; scores from einsum.
    "xlnet": (
        "XLNetModel",
        "XLNetConfig",
        {"d_model": 24, "n_layer": 1, "n_head": 4, "d_inner": 40, "vocab_size": 61},
        ["rel_attn"],
    ),
    # Projections that are convolutions.
    "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", {**_SIZES, "embedding_size": 24}, QUERY_VALUE),
    # A second softmax, of convolution kernels, next to the attention.
    "convbert": ("ConvBertModel", "ConvBertConfig", _SIZES, QUERY_VALUE),
}


def build(model_class: str, config_class: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()


def _ids(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    return {"input_ids": ids, **more}


@pytest.mark.few(6)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # older DeBERTa code
@pytest.mark.parametrize("name", MORE)
def test_more_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class, config_class, config, names = MORE[name]
    monkeypatch.setitem(OTHER_NAMES, name, names)
    model = build(model_class, config_class, config)
    assert differences(name, model, _ids(model)) == []


def test_three_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 20, "patch_size": 5}
    config = transformers.Blip2Config(
        vision_config={**vision, "intermediate_size": 40},
        qformer_config={**_SIZES, "encoder_hidden_size": 24},
        text_config={**_T5, "model_type": "t5", "decoder_start_token_id": 0},
        num_query_tokens=3,
        image_token_index=60,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Blip2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[60, 60, 60, 5, 9, 2, 7], [60, 60, 60, 8, 4, 6, 3]])
    inputs = {"pixel_values": torch.zeros(2, 3, 20, 20), "input_ids": ids, "decoder_input_ids": ids[:, 3:]}
    monkeypatch.setitem(OTHER_NAMES, "blip-2", ["qkv", "query", "value", "q", "v"])
    assert differences("blip-2", model, inputs) == []


def test_wrong_names_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    monkeypatch.setitem(OTHER_NAMES, "llama", ["q_proj"])
    mine, peft_s = differences("llama", family.build(), family.inputs(2, 7)), PEFT["llama"]
    assert mine == [f"found {peft_s}, and here are ['q_proj']"]
    monkeypatch.setitem(DIFFERS, "llama", "no difference at all")
    assert len(differences("llama", family.build(), family.inputs(2, 7))) == 2


def test_every_difference_is_checked() -> None:
    covered = {*MORE, *FAMILIES, "gemma4_text", "blip-2"}
    assert set(DIFFERS) <= covered
