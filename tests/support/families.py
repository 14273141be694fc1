"""Tiny transformers models with random weights: one per architecture family, the models every end-to-end test runs on.

Nothing is downloaded. A model is built anew on every ``build()``, from a fixed seed, in eval mode and float32; every
parameter and running statistic is perturbed, so that a dropped bias or norm weight changes the output. Sizes differ
wherever the architecture lets them, so that a transposed weight is a shape error and not a silent success.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 61


@dataclass(frozen=True)
class Family:
    """``build()`` gives the model; ``inputs(batch, seq)`` its keyword inputs, always the same for the same sizes.

    ``seq`` is ignored where an input has no sequence (``kind`` "vision", "image"). ``kind`` is one of "causal",
    "encoder", "seq2seq", "vision" (patches), "image" (convolutions), "audio".
    """

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[int, int], dict[str, Tensor]]
    kind: str


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter and running statistic, in place, scaled so that activations stay near one."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t.dtype)

    for p in model.parameters():
        p.add_(noise(p) * (0.1 if p.ndim < 2 else 0.5 * (p.shape[0] / p.numel()) ** 0.5))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.add_(0.1 * noise(b))
        elif name.endswith("running_var"):
            b.mul_((0.1 * noise(b)).exp())


def _build(model_class: str, config_class: str, config: dict[str, Any]) -> PreTrainedModel:
    import transformers

    with warnings.catch_warnings():
        # Releases of transformers before 5.24 script a function of some families when these are imported.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        make_model, make_config = getattr(transformers, model_class), getattr(transformers, config_class)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(make_config(**config))
    perturb(model)
    return model.eval()


def _ids(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    return torch.randint(4, VOCAB, (batch, seq), generator=generator)


def _text(batch: int, seq: int) -> dict[str, Tensor]:
    """Token ids, and a mask that pads the end of the last row: all-ones masks would let eager models skip the mask."""
    ids = _ids(batch, seq, torch.Generator().manual_seed(1000 * batch + seq))
    mask = torch.ones_like(ids)
    mask[-1, seq - seq // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _seq2seq(batch: int, seq: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7 + 1000 * batch + seq)
    return {**_text(batch, seq), "decoder_input_ids": _ids(batch, seq + 2, generator)}


def _pixels(batch: int, seq: int, size: int = 20, channels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, channels, size, size, generator=generator)}


def _audio(batch: int, seq: int, mels: int = 10, frames: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + seq)
    features = torch.randn(batch, mels, frames, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(batch, seq, generator)}


_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Four query heads of eight over a width of 24: neither the query, key nor output projection is square.
_DECODER = {
    **_TEXT,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_NO_HEAD_DIM = {k: v for k, v in _DECODER.items() if k != "head_dim"}
_NO_KV = {k: v for k, v in _NO_HEAD_DIM.items() if k != "num_key_value_heads"}
_SEQ2SEQ = {
    **_TEXT,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 5,
    "num_channels": 3,
}

_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "mistral": ("Mistral", {**_DECODER, "sliding_window": 6}),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", _NO_HEAD_DIM),
    "qwen3": ("Qwen3", _DECODER),
    "qwen3_moe": ("Qwen3Moe", {**_DECODER, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
    "gemma": ("Gemma", _DECODER),
    "gemma2": ("Gemma2", {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gemma3_text": ("Gemma3", {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "phi": ("Phi", {**_NO_KV, "partial_rotary_factor": 0.34}),
    "phi3": ("Phi3", _NO_HEAD_DIM),
    "granite": ("Granite", _NO_HEAD_DIM),
    "olmo2": ("Olmo2", _NO_HEAD_DIM),
    "cohere": ("Cohere", {**_NO_HEAD_DIM, "logit_scale": 0.7}),
    "stablelm": ("StableLm", _NO_HEAD_DIM),
    "starcoder2": ("Starcoder2", _NO_HEAD_DIM),
    "smollm3": ("SmolLM3", _NO_HEAD_DIM),
    "glm": ("Glm", _DECODER),
    "gpt2": ("GPT2", {**_TEXT, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gptj": (
        "GPTJ",
        {**_TEXT, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "gpt_neo": (
        "GPTNeo",
        {**_NO_KV, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    "gpt_neox": ("GPTNeoX", _NO_KV),
    "gpt_bigcode": ("GPTBigCode", {**_TEXT, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", {**_NO_KV, "ffn_dim": 40, "word_embed_proj_dim": 20}),
    "bloom": ("Bloom", {**_TEXT, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "Falcon",
        {**_TEXT, "hidden_size": 24, "ffn_hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_NO_HEAD_DIM,
            "num_key_value_heads": 4,
            "kv_lora_rank": 11,
            "q_lora_rank": 10,
            "qk_nope_head_dim": 7,
            "qk_rope_head_dim": 6,
            "v_head_dim": 5,
            "first_k_dense_replace": 1,
            "n_routed_experts": 3,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
        },
    ),
    "mamba": ("Mamba", {**_TEXT, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "state_size": 5}),
}
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _NO_KV),
    "roberta": ("RobertaForSequenceClassification", {**_NO_KV, "num_labels": 3, "max_position_embeddings": 66}),
    "distilbert": (
        "DistilBertForTokenClassification",
        {**_TEXT, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraForQuestionAnswering", {**_NO_KV, "embedding_size": 20}),
    "albert": ("AlbertForMaskedLM", {**_NO_KV, "embedding_size": 20}),
    "mpnet": ("MPNetForMaskedLM", {**_NO_KV, "max_position_embeddings": 66}),
    "modernbert": ("ModernBertForMaskedLM", {**_NO_KV, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        {
            **_NO_KV,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
}
_T5 = {**_TEXT, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}


def _families() -> list[Family]:
    out: list[Family] = []

    def add(name: str, inputs: Callable[[int, int], dict[str, Tensor]], kind: str, *spec: Any) -> None:
        out.append(Family(name, partial(_build, *spec), inputs, kind))

    for name, (stem, config) in _CAUSAL.items():
        cfg = f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config"
        model = f"{stem}LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
        add(name, _text, "causal", model, cfg, config)
    for name, (model, config) in _ENCODERS.items():
        add(name, _text, "encoder", model, model.split("For")[0] + "Config", config)
    add("t5", _seq2seq, "seq2seq", "T5ForConditionalGeneration", "T5Config", _T5)
    add("bart", _seq2seq, "seq2seq", "BartForConditionalGeneration", "BartConfig", _SEQ2SEQ)
    add("mbart", _seq2seq, "seq2seq", "MBartForConditionalGeneration", "MBartConfig", _SEQ2SEQ)
    whisper = {**_SEQ2SEQ, "num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 64}
    add("whisper", _audio, "audio", "WhisperForConditionalGeneration", "WhisperConfig", whisper)
    add("vit", _pixels, "vision", "ViTForImageClassification", "ViTConfig", {**_VISION, "num_labels": 3})
    dino = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
    add(
        "dinov2",
        _pixels,
        "vision",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**dino, "mlp_ratio": 2, "num_labels": 3},
    )
    add("clip_vision", _pixels, "vision", "CLIPVisionModel", "CLIPVisionConfig", _VISION)
    add("siglip_vision", _pixels, "vision", "SiglipVisionModel", "SiglipVisionConfig", _VISION)
    resnet = {
        "embedding_size": 6,
        "hidden_sizes": [10, 14],
        "depths": [1, 2],
        "layer_type": "bottleneck",
        "num_labels": 3,
    }
    add("resnet", _pixels, "image", "ResNetForImageClassification", "ResNetConfig", resnet)
    convnext = {
        "hidden_sizes": [6, 10],
        "depths": [1, 2],
        "num_stages": 2,
        "patch_size": 2,
        "image_size": 20,
        "num_labels": 3,
    }
    add("convnext", _pixels, "image", "ConvNextForImageClassification", "ConvNextConfig", convnext)
    return out


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}
