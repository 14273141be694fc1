"""Give the default values of config fields that depend on the architecture: names of modules per model type.

Most methods adapt the query and value projections. Those are found in the graph
(``passes.analysis.attention.attention_targets``), whatever the architecture calls them, so such methods need no names
here. The tables hold the cases in which PEFT 0.21.2 adapts other layers: an adapter that PEFT made with defaults must
adapt the same layers here. Their keys are ``config.model_type`` of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

#: model type -> names of modules, separated by spaces
NamesByModelType = Mapping[str, str]

_LLAMA_NORMS = "input_layernorm post_attention_layernorm norm"
_GEMMA2_NORMS = f"{_LLAMA_NORMS} pre_feedforward_layernorm post_feedforward_layernorm"
_BLOOM_NORMS = "input_layernorm post_attention_layernorm ln_f"
_BART_PROJECTIONS = "q_proj k_proj v_proj out_proj fc1 fc2"
_LLAMA_PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_LLAMA_LIKE = ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi")
_FUSED_QKV_MODELS = ("gpt_neox", "RefinedWeb", "RefinedWebModel", "falcon")

#: all projections for a few model types; the others adapt query and value
_ALL_PROJECTIONS: NamesByModelType = {
    "t5": "q k v o wi wo",
    "mt5": "q k v o wi_0 wi_1 wo",
    "bart": _BART_PROJECTIONS,
    "opt": _BART_PROJECTIONS,
    "deberta-v2": "query_proj key_proj value_proj dense",
}
#: the second layer of the MLP for types whose query, key and value are one layer; the others adapt query and value
_GPT2_MLP: NamesByModelType = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}

_FEEDFORWARD: NamesByModelType = {
    **dict.fromkeys(_LLAMA_LIKE, "down_proj"),
    **dict.fromkeys(_FUSED_QKV_MODELS, "dense_4h_to_h"),
    **dict.fromkeys(("bert", "roberta", "deberta", "deberta-v2"), "output.dense"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "mlp.c_proj"),
    **dict.fromkeys(("bart", "opt", "phi"), "fc2"),
    "t5": "wo",
    "mt5": "",
    "bloom": "mlp.dense_4h_to_h",
    "gptj": "fc_out",
    "gpt_neo": "c_proj",
    "mixtral": "w2",
}
_IA3: NamesByModelType = {
    **{k: f"q_proj v_proj {_FEEDFORWARD[k]}" for k in (*_LLAMA_LIKE, "bart", "gptj", "gpt_neo")},
    **{k: f"k_proj v_proj {_FEEDFORWARD[k]}" for k in ("llama", "mistral", "mixtral")},
    **{k: f"query_key_value {_FEEDFORWARD[k]}" for k in (*_FUSED_QKV_MODELS, "bloom")},
    **{k: f"c_attn {_FEEDFORWARD[k]}" for k in ("gpt2", "gpt_bigcode")},
    **{k: f"key value {_FEEDFORWARD[k]}" for k in ("bert", "roberta")},
    "opt": "q_proj k_proj fc2",
    "t5": "k v wo",
    "mt5": "k v wi_1",
    "deberta": "in_proj output.dense",
    "deberta-v2": "key_proj value_proj output.dense",
}
_NORMS: NamesByModelType = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _LLAMA_NORMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2_NORMS),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM_NORMS),
    **dict.fromkeys(("t5", "mt5"), "layer_norm final_layer_norm"),
    **dict.fromkeys(("qwen2", "qwen3"), "post_attention_layernorm"),
    "llava": f"multi_modal_projector {_LLAMA_NORMS} embed_tokens lm_head",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
    "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm",
    "gpt2": "ln_1 ln_2 ln_f",
    "gptj": "ln_1 ln_f",
    "phi": "input_layernorm final_layernorm",
}
_BEFT: NamesByModelType = {
    **dict.fromkeys((*_LLAMA_LIKE, "opt", "gptj", "gpt_neo", "bart"), "v_proj"),
    **dict.fromkeys(("bert", "roberta"), "value"),
    **dict.fromkeys(("t5", "mt5"), "v"),
    "deberta-v2": "value_proj",
}
_OSF: NamesByModelType = {
    **dict.fromkeys(_LLAMA_LIKE, _LLAMA_PROJECTIONS),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), "query_key_value dense_4h_to_h"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_attn c_proj"),
    "opt": _BART_PROJECTIONS,
    "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
}

#: peft_type -> field -> model type -> names
DEFAULT_TABLES: Mapping[str, Mapping[str, NamesByModelType]] = MappingProxyType(
    {
        "ADALORA": {"target_modules": {**_ALL_PROJECTIONS, "roberta": "query key value dense"}},
        "VBLORA": {"target_modules": _ALL_PROJECTIONS},
        "C3A": {"target_modules": _GPT2_MLP},
        "FOURIERFT": {"target_modules": _GPT2_MLP},
        "WAVEFT": {"target_modules": _GPT2_MLP},
        "IA3": {"target_modules": _IA3, "feedforward_modules": _FEEDFORWARD},
        "LN_TUNING": {"target_modules": _NORMS},
        "BEFT": {"target_modules": _BEFT},
        "OSF": {"target_modules": _OSF},
    }
)
#: methods that adapt other layers than query and value, so that the graph gives no default for an unknown model type
NO_GRAPH_DEFAULTS = frozenset({"IA3", "LN_TUNING", "BEFT", "OSF", "TRAINABLE_TOKENS"})

#: model types in PEFT's table of defaults, whose default layers PEFT adapts even where ``target_parameters`` is given
_DEFAULTS_KEPT_TOO = frozenset(
    {"bart", "bert", "blip-2", "bloom", "btlm", "chatglm", "codegen", "deberta", "deberta-v2", "electra", "falcon"}
    | {"gemma", "gemma2", "gemma3_text", "gemma4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "layoutlm"}
    | {"llama", "llama4", "mistral", "mixtral", "mpt", "mt5", "nemotron_h", "opt", "phi", "qwen2", "qwen3", "t5"}
    | {"RefinedWeb", "RefinedWebModel", "roberta", "rwkv", "rwkv7", "stablelm", "xlm-roberta"}
)


def adds_default_modules(model_type: str | None) -> bool:
    """Return whether a config with ``target_parameters`` and no ``target_modules`` adapts its default modules too."""
    return model_type in _DEFAULTS_KEPT_TOO


def default_modules(peft_type: str, model_type: str | None, modules: Iterable[str] = ()) -> dict[str, Any]:
    """Return the default names of a method's config for a model type: field -> names; {} where there is no default.

    ``modules``: the paths of the model's modules. A name that ends none of them is left out, since a model type has
    variants: T5's gated feed-forward layers have other names. Without ``modules`` every name is kept.
    """
    paths = list(modules)
    out: dict[str, Any] = {}
    for name, table in DEFAULT_TABLES.get(peft_type, {}).items():
        if model_type is not None and model_type in table:
            entries = table[model_type].split()
            out[name] = [e for e in entries if not paths or any(p == e or p.endswith(f".{e}") for p in paths)]
    if "target_modules" in out and not out["target_modules"]:
        del out["target_modules"]
    return out
