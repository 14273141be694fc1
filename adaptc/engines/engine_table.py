"""List the engines whose limits are known: one table, read off the engines' own sources.

Keys of ``limits`` are the traits of :mod:`adaptc.engines.traits`. Each limit names the file of the engine that says so.
A later version of an engine may take more, so the version stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaptc.engines.limits import EngineLimits, changed, refused

_NOT_READ = "the option is not read, so the tensors are taken for plain LoRA"
_BASE = "the option is not read: the adapter is added to the original base, which training had changed"
_UNKNOWN_KEYS = "tensors with other names than LoRA's are left out"

# vLLM looks LoRA up by the names in packed_modules_mapping of a model's class (vllm/lora/model_manager.py). They are
# fused for Phi3ForCausalLM and split for LlamaForCausalLM. llama.cpp has a tensor name for each layer of the model.

# -- vLLM --------------------------------------------------------------------------------------------------------------
_PEFT_HELPER, _LORA_NAMES = "vllm/lora/peft_helper.py", "vllm/lora/utils.py parse_fine_tuned_lora_name"
_NAMES = "every key must be one of lora_A, lora_B, lora_embedding_A or lora_embedding_B"
VLLM = EngineLimits(
    "vllm",
    "0.33.0",
    "PEFT",
    f"{_PEFT_HELPER} get_rank_and_scaling",
    {
        "method": refused("it reads LoRA alone", _PEFT_HELPER),
        "prompt method": refused("it reads LoRA alone", _PEFT_HELPER),
        "use_dora": refused("it has no DoRA", _PEFT_HELPER),
        "lora_bias": refused("it has no bias of LoRA", _PEFT_HELPER),
        "bias": refused("it has no trained biases", f"{_PEFT_HELPER} validate_legal"),
        "modules_to_save": refused("it takes no whole modules but classifier and score", _PEFT_HELPER),
        "trainable_token_indices": refused(_NAMES, _LORA_NAMES),
        "alora_invocation_tokens": refused("it has no aLoRA", _PEFT_HELPER),
        "layer_replication": refused("it does not repeat layers", _PEFT_HELPER),
        "use_qalora": refused("it does not pool inputs", _PEFT_HELPER),
        "use_bdlora": refused("it has no BD-LoRA of PEFT's", _PEFT_HELPER),
        "arrow_config": changed(_NOT_READ, _PEFT_HELPER),
        "kasa_config": refused(_NAMES, _LORA_NAMES),
        "init_lora_weights": refused("the adapter is for a base that its first values changed", _PEFT_HELPER),
        "convolution": refused("it adapts linear layers and embeddings alone", "vllm/lora/lora_model.py"),
        "rank": refused("512 is the largest max_lora_rank", "vllm/config/lora.py MaxLoRARanks"),
        "other tensors": refused(_NAMES, _LORA_NAMES),
    },
    max_rank=512,
    saved_modules=("classifier", "score"),
)

# -- SGLang ------------------------------------------------------------------------------------------------------------
_SGLANG, _POOL, _MANAGER = (f"sglang/srt/lora/{n}.py" for n in ("lora", "mem_pool", "lora_manager"))
_SHAPES = "tensors of other shapes fail an assertion"
SGLANG = EngineLimits(
    "sglang",
    "0.5.23",
    "alpha / r",
    f"{_SGLANG} LoRAAdapter.__init__",
    {
        "method": refused("it reads LoRA alone", f"{_SGLANG} LoRAAdapter.__init__"),
        "prompt method": refused("it reads LoRA alone", f"{_SGLANG} LoRAAdapter.__init__"),
        "use_dora": refused("it has no DoRA", f"{_MANAGER} validate_new_adapter"),
        "lora_bias": changed(
            "the bias is left out: lora_B.weight takes its place", f"{_POOL} load_lora_weight_to_buffer"
        ),
        "bias": changed("trained biases are left out", f"{_POOL} load_lora_weight_to_buffer"),
        "modules_to_save": changed("whole modules are left out", f"{_SGLANG} _process_weight"),
        "trainable_token_indices": changed("trained rows are left out", f"{_SGLANG} _process_weight"),
        "alora_invocation_tokens": changed(
            "the option is not read: it acts at every token", "sglang/srt/lora/lora_config.py"
        ),
        "layer_replication": changed(_NOT_READ, "sglang/srt/lora/lora_config.py"),
        "use_qalora": refused(_SHAPES, f"{_POOL} load_lora_weight_to_buffer"),
        "use_bdlora": refused(_SHAPES, f"{_POOL} load_lora_weight_to_buffer"),
        "arrow_config": changed(_NOT_READ, "sglang/srt/lora/lora_config.py"),
        "kasa_config": refused(_SHAPES, f"{_POOL} load_lora_weight_to_buffer"),
        "init_lora_weights": changed(_BASE, "sglang/srt/lora/lora_config.py"),
        "target_parameters": changed("keys of stacked experts match no module and are skipped", _POOL),
        "convolution": refused(
            "it adapts linear layers and embeddings alone", "sglang/srt/lora/layers.py get_lora_layer"
        ),
        "target_modules": refused("an expression is no list of module names", f"{_MANAGER} init_lora_shapes"),
        "ranks": refused("every module must have the rank r", f"{_POOL} load_lora_weight_tensor"),
        "q_proj without v_proj": refused("q_proj is joined to the v_proj beside it", f"{_SGLANG} normalize_qkv_proj"),
        "k_proj or v_proj without q_proj": changed(
            "they are skipped without a q_proj", f"{_SGLANG} normalize_qkv_proj"
        ),
        "up_proj without gate_proj": changed("it is skipped without a gate_proj", f"{_SGLANG} normalize_gate_up_proj"),
        "other tensors": changed("tensors with other names are left out, or taken for lora_B", _POOL),
    },
    # normalize_qkv_proj and normalize_gate_up_proj join parts, and repeat A of layers that are fused already.
    takes_fused=True,
    wanted_siblings={"k_proj": "q_proj", "v_proj": "q_proj", "q_proj": "v_proj", "up_proj": "gate_proj"},
)

# -- llama.cpp ---------------------------------------------------------------------------------------------------------
_CONVERT, _ADAPTER = "convert_lora_to_gguf.py", "src/llama-adapter.cpp"
_ODD_NAME = "its converter takes tensors called lora_A, lora_B, lora_embedding_A and lora_embedding_B alone"
_GGUF_SHAPE = "the shapes of A and B must be those of the model's weight"
LLAMA_CPP = EngineLimits(
    "llama.cpp",
    "0b03adaa (2026)",
    "alpha / rank",
    "src/llama-adapter.h get_scale",
    {
        "method": refused(_ODD_NAME, _CONVERT),
        "prompt method": refused(_ODD_NAME, _CONVERT),
        "use_dora": refused(_ODD_NAME, _CONVERT),
        "lora_bias": refused(_ODD_NAME, _CONVERT),
        "bias": refused(_ODD_NAME, _CONVERT),
        "modules_to_save": refused(_ODD_NAME, _CONVERT),
        "trainable_token_indices": refused(_ODD_NAME, _CONVERT),
        "layer_replication": refused("the model has no tensors of the repeated layers", _ADAPTER),
        "use_qalora": refused(_GGUF_SHAPE, _ADAPTER),
        "use_bdlora": refused(_GGUF_SHAPE, _ADAPTER),
        "arrow_config": changed(_NOT_READ, _CONVERT),
        "kasa_config": refused(_ODD_NAME, _CONVERT),
        "init_lora_weights": changed(_BASE, _CONVERT),
        "target_parameters": refused(_GGUF_SHAPE, _ADAPTER),
        "convolution": refused("its language models have no convolutions with LoRA", _CONVERT),
        "other tensors": refused(_ODD_NAME, _CONVERT),
    },
)

# -- OpenVINO GenAI ----------------------------------------------------------------------------------------------------
_OPENVINO = "openvino.genai src/cpp/src/lora/adapter.cpp"
_OV_KEYS = f"{_OPENVINO} default_lora_patterns"
OPENVINO = EngineLimits(
    "openvino",
    "2026.4.0",
    "1",
    f"{_OPENVINO} collect_applicable_tensors: adapter_config.json is not read",
    {
        "method": changed(_UNKNOWN_KEYS, _OV_KEYS),
        "prompt method": changed(_UNKNOWN_KEYS, _OV_KEYS),
        "use_dora": changed("magnitudes are left out", _OV_KEYS),
        "lora_bias": changed("biases are left out", _OV_KEYS),
        "bias": changed("biases are left out", _OV_KEYS),
        "modules_to_save": changed(
            "whole modules but lm_head and embed_tokens are left out", f"{_OPENVINO} default_lora_constant_patterns"
        ),
        "trainable_token_indices": changed(_UNKNOWN_KEYS, _OV_KEYS),
        "alora_invocation_tokens": changed("the option is not read: it acts at every token", _OPENVINO),
        "layer_replication": changed(_NOT_READ, _OPENVINO),
        "use_qalora": changed(_NOT_READ, _OPENVINO),
        "use_bdlora": changed(_NOT_READ, _OPENVINO),
        "arrow_config": changed(_NOT_READ, _OPENVINO),
        "kasa_config": changed(_UNKNOWN_KEYS, _OV_KEYS),
        "init_lora_weights": changed(_BASE, _OPENVINO),
        "target_parameters": changed("keys of stacked experts match no layer and are left out", _OPENVINO),
        "embedding": changed("lora_embedding_A and lora_embedding_B are left out", _OV_KEYS),
        "convolution": refused("only convolutions with a kernel of one are taken", f"{_OPENVINO} squeeze_2d"),
        "dtype": refused("it reads float32, float16 and bfloat16 alone", f"{_OPENVINO} safetensors_to_ov_element_type"),
        "other tensors": changed(_UNKNOWN_KEYS, _OV_KEYS),
    },
    saved_modules=("lm_head", "embed_tokens"),
    dtypes=("F32", "F16", "BF16"),
    takes_pointwise=True,
)

# -- ONNX Runtime GenAI ------------------------------------------------------------------------------------------------
_BUILDER = "onnxruntime-genai src/python/py/models/builders/base.py"
_MATMUL = f"{_BUILDER} make_matmul_lora"
ONNXRUNTIME_GENAI = EngineLimits(
    "onnxruntime-genai",
    "0.16.0-dev (a0c04eb1), the model builder with adapter_path",
    "PEFT",
    _MATMUL,
    {
        "method": refused("it reads lora_A and lora_B of every adapted layer", _MATMUL),
        "prompt method": changed("virtual tokens are left out", f"{_BUILDER} make_model"),
        "use_dora": changed("magnitudes are left out", _MATMUL),
        "lora_bias": changed("biases are left out", _MATMUL),
        "modules_to_save": changed("its walk over the model takes the original module", f"{_BUILDER} make_model"),
        "trainable_token_indices": changed("trained rows are left out", f"{_BUILDER} make_model"),
        "alora_invocation_tokens": changed("it acts at every token", _MATMUL),
        "layer_replication": changed("the number of layers is that of the base", f"{_BUILDER} make_model"),
        "use_qalora": changed("inputs are not pooled", _MATMUL),
        "use_bdlora": changed("blocks are taken for whole factors", _MATMUL),
        "arrow_config": changed("tokens are not routed", _MATMUL),
        "kasa_config": changed("singular values are left out", _MATMUL),
        "target_parameters": changed("adapters of parameters are left out", f"{_BUILDER} make_model"),
        "embedding": changed("the base's embedding is taken", f"{_BUILDER} make_model"),
        "other tensors": changed(_UNKNOWN_KEYS, _MATMUL),
    },
)

# -- diffusers and PEFT ------------------------------------------------------------------------------------------------
_LOADERS = "diffusers/loaders/peft.py load_lora_adapter"
_DIFFUSERS_LORA = refused("it reads LoRA and LoKr alone", _LOADERS)
DIFFUSERS = EngineLimits(
    "diffusers",
    "0.42.1",
    "1",
    "diffusers/utils/peft_utils.py get_peft_kwargs: adapter_config.json is not read",
    {
        "method": _DIFFUSERS_LORA,
        "prompt method": _DIFFUSERS_LORA,
        "PEFT directory": changed("most pipelines look for keys that begin with a component, and find none", _LOADERS),
        "bias": changed("trained biases have no place in the config that is made of the keys", _LOADERS),
        "modules_to_save": changed("whole modules have no place in the config that is made of the keys", _LOADERS),
        "trainable_token_indices": changed(_UNKNOWN_KEYS, _LOADERS),
        "alora_invocation_tokens": changed("the option is not read: it acts at every token", _LOADERS),
        "layer_replication": changed(_NOT_READ, _LOADERS),
        "use_qalora": changed(_NOT_READ, _LOADERS),
        "use_bdlora": changed(_NOT_READ, _LOADERS),
        "arrow_config": changed(_NOT_READ, _LOADERS),
        "kasa_config": changed(_UNKNOWN_KEYS, _LOADERS),
        "init_lora_weights": changed(_BASE, _LOADERS),
        "target_parameters": changed(_NOT_READ, _LOADERS),
        "embedding": changed("the config that is made of the keys has no embeddings", _LOADERS),
        "other tensors": changed(_UNKNOWN_KEYS, _LOADERS),
    },
)
PEFT = EngineLimits(
    "peft",
    "0.21.2",
    "PEFT",
    "peft/tuners/lora/layer.py",
    {"unknown method": refused("it has no such type", "peft/utils/peft_types.py")},
)

#: engine by the name that users give
ENGINES: Mapping[str, EngineLimits] = MappingProxyType(
    {e.name: e for e in (VLLM, SGLANG, LLAMA_CPP, OPENVINO, ONNXRUNTIME_GENAI, DIFFUSERS, PEFT)}
)
