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
Names = Mapping[str, str]

_LLAMA_NORMS = "input_layernorm post_attention_layernorm norm"
_GEMMA2_NORMS = f"{_LLAMA_NORMS} pre_feedforward_layernorm post_feedforward_layernorm"
_BLOOM_NORMS = "input_layernorm post_attention_layernorm ln_f"
_ALL_OF_BART = "q_proj k_proj v_proj out_proj fc1 fc2"
_ALL_OF_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_LLAMAS = ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi")
_FUSED = ("gpt_neox", "RefinedWeb", "RefinedWebModel", "falcon")

#: all projections for a few model types; the others adapt query and value
_SOME_WHOLE: Names = {
    "t5": "q k v o wi wo",
    "mt5": "q k v o wi_0 wi_1 wo",
    "bart": _ALL_OF_BART,
    "opt": _ALL_OF_BART,
    "deberta-v2": "query_proj key_proj value_proj dense",
}
#: the second layer of the MLP for types whose query, key and value are one layer; the others adapt query and value
_MLP_OF_GPT2: Names = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}

_FEEDFORWARD: Names = {
    **dict.fromkeys(_LLAMAS, "down_proj"),
    **dict.fromkeys(_FUSED, "dense_4h_to_h"),
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
_IA3: Names = {
    **{k: f"q_proj v_proj {_FEEDFORWARD[k]}" for k in (*_LLAMAS, "bart", "gptj", "gpt_neo")},
    **{k: f"k_proj v_proj {_FEEDFORWARD[k]}" for k in ("llama", "mistral", "mixtral")},
    **{k: f"query_key_value {_FEEDFORWARD[k]}" for k in (*_FUSED, "bloom")},
    **{k: f"c_attn {_FEEDFORWARD[k]}" for k in ("gpt2", "gpt_bigcode")},
    **{k: f"key value {_FEEDFORWARD[k]}" for k in ("bert", "roberta")},
    "opt": "q_proj k_proj fc2",
    "t5": "k v wo",
    "mt5": "k v wi_1",
    "deberta": "in_proj output.dense",
    "deberta-v2": "key_proj value_proj output.dense",
}
_NORMS: Names = {
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
_VALUE: Names = {
    **dict.fromkeys((*_LLAMAS, "opt", "gptj", "gpt_neo", "bart"), "v_proj"),
    **dict.fromkeys(("bert", "roberta"), "value"),
    **dict.fromkeys(("t5", "mt5"), "v"),
    "deberta-v2": "value_proj",
}
_WHOLE: Names = {
    **dict.fromkeys(_LLAMAS, _ALL_OF_LLAMA),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), "query_key_value dense_4h_to_h"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_attn c_proj"),
    "opt": _ALL_OF_BART,
    "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
}

#: peft_type -> field -> model type -> names
TABLES: Mapping[str, Mapping[str, Names]] = MappingProxyType(
    {
        "ADALORA": {"target_modules": {**_SOME_WHOLE, "roberta": "query key value dense"}},
        "VBLORA": {"target_modules": _SOME_WHOLE},
        "C3A": {"target_modules": _MLP_OF_GPT2},
        "FOURIERFT": {"target_modules": _MLP_OF_GPT2},
        "WAVEFT": {"target_modules": _MLP_OF_GPT2},
        "IA3": {"target_modules": _IA3, "feedforward_modules": _FEEDFORWARD},
        "LN_TUNING": {"target_modules": _NORMS},
        "BEFT": {"target_modules": _VALUE},
        "OSF": {"target_modules": _WHOLE},
    }
)
#: methods that adapt other layers than query and value, so that the graph gives no default for an unknown model type
OTHER_MEANING = frozenset({"IA3", "LN_TUNING", "BEFT", "OSF", "TRAINABLE_TOKENS"})

#: model types in PEFT's table of defaults, whose default layers PEFT adapts even where ``target_parameters`` is given
_BESIDE_PARAMETERS = frozenset(
    {"bart", "bert", "blip-2", "bloom", "btlm", "chatglm", "codegen", "deberta", "deberta-v2", "electra", "falcon"}
    | {"gemma", "gemma2", "gemma3_text", "gemma4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "layoutlm"}
    | {"llama", "llama4", "mistral", "mixtral", "mpt", "mt5", "nemotron_h", "opt", "phi", "qwen2", "qwen3", "t5"}
    | {"RefinedWeb", "RefinedWebModel", "roberta", "rwkv", "rwkv7", "stablelm", "xlm-roberta"}
)


def adapts_defaults(model_type: str | None) -> bool:
    """Return whether a config with ``target_parameters`` and no ``target_modules`` adapts its default modules too."""
    return model_type in _BESIDE_PARAMETERS


def defaults(peft_type: str, model_type: str | None, modules: Iterable[str] = ()) -> dict[str, Any]:
    """Return the default names of a method's config for a model type: field -> names; {} where there is no default.

    ``modules``: the paths of the model's modules. A name that ends none of them is left out, since a model type has
    variants: T5's gated feed-forward layers have other names. Without ``modules`` every name is kept.
    """
    paths = list(modules)
    out: dict[str, Any] = {}
    for name, table in TABLES.get(peft_type, {}).items():
        if model_type is not None and model_type in table:
            entries = table[model_type].split()
            out[name] = [e for e in entries if not paths or any(p == e or p.endswith(f".{e}") for p in paths)]
    if "target_modules" in out and not out["target_modules"]:
        del out["target_modules"]
    return out
