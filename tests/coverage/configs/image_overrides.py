"""Holds what small configs with images or sounds need besides the sizes of :mod:`tests.coverage.configs.sizes`."""

from __future__ import annotations

from typing import Any

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
    "out_features": ["stage4"],
    "num_channels": 3,
}
_DETR = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": _RESNET}
_FOUR = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
_DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "backbone_config": _FOUR}
_BEIT = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
_TILES = {"image_grid_pinpoints": [[64, 32], [32, 64]]}
_SWIN = {"window_size": 2, "image_size": 64}


def _mrope(*sections: int) -> dict[str, Any]:
    """Return the rotary sections of the text part."""
    return {"text_config": {"rope_parameters": {"mrope_section": list(sections)}}}


#: as :data:`tests.coverage.configs.overrides.OVERRIDES`
IMAGE_OVERRIDES: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": _BEIT,
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "Data2VecVisionForSemanticSegmentation": _BEIT,
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "align": {"vision_config": {"hidden_dim": 640}, "projection_dim": 640},
    "apertus1p5": {"audio_config": {"codebook_dim": 32}},
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 95},
    "chameleon": {
        "vocabulary_map": {"<image>": 95, **{f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(8)}},
        "vq_config": {"num_embeddings": 8, "resolution": 32, "base_channels": 32, "channel_multiplier": [1, 1, 2]},
    },
    "chmv2": _DPT,
    "conditional_detr": _DETR,
    "cvt": {"depth": [1, 2, 3]},
    "dab-detr": _DETR,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deformable_detr": {**_DETR, "num_feature_levels": 1},
    "depth_anything": _DPT,
    "detr": _DETR,
    "donut-swin": _SWIN,
    "dots3_note": {"vision_config": {"adapter_in_dim": 32}, "audio_config": {"adapter_input_size": 32}},
    "dpt": {**_DPT, "backbone_config": None, "is_hybrid": False},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.2, "hidden_dim": 1280},
    "emu3": {
        "vocabulary_map": {
            "<image>": 95,
            "<|extra_200|>": 70,
            **{f"<|visual token {i:06d}|>": 60 + i for i in range(8)},
        },
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "ernie4_5_vl_moe": _mrope(1, 1, 2),
    "exaone4_5": {"vision_config": {"window_size": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}, "vision_config": {"output_proj_dims": 32}},
    "glm46v": _mrope(2, 1, 1),
    "glm4v": _mrope(2, 1, 1),
    "glm4v_moe": _mrope(1, 1, 0),
    "glm5_next": {"text_config": {"index_kpool": 4, "qk_rope_head_dim": 0}},
    "glm_ocr": _mrope(2, 1, 1),
    "glmga": _mrope(2, 1, 1),
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "granite_speech5_ctc": {"encoder_config": {"num_key_value_heads": 4}},
    "hgnet_v2": {
        "embedding_size": 8,
        "hidden_sizes": [16, 32, 48, 64],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 32, 48],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 32, 48, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hunyuan_vl": _mrope(1, 1, 1, 1),
    "hyperclovax_vision_v2": {"vision_config": {"window_size": 32}},
    "instructblip": {"image_token_index": 95},
    "instructblipvideo": {"video_token_index": 95, "image_token_index": 95},
    "kosmos-2": {"latent_query_num": 4},
    "levit": {"hidden_sizes": [16, 32, 48], "key_dim": [8, 8, 8], "num_attention_heads": [2, 4, 6]},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "lw_detr": {
        "backbone_config": {
            **_FOUR,
            "image_size": 64,
            "window_block_indices": [0, 2],
            "num_windows": 4,
            "num_windows_side": 2,
        },
        "projector_scale_factors": [1.0],
    },
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2]}},
    "mllama": {"vision_config": {"vision_output_dim": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}},
    "paddleocr_vl": _mrope(2, 1, 1),
    "pp_doclayout_v2": {"initializer_bias_prior_prob": 0.01},
    # At the usual range all boxes have nearly the same score, and rounding chooses among them.
    "pp_doclayout_v3": {"x4_feat_dim": 16, "initializer_range": 0.3},
    "prompt_depth_anything": _DPT,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 70, **_mrope(2, 1, 1), "vision_config": {"window_size": 32}},
    "qwen2_5_vl": {**_mrope(2, 1, 1), "vision_config": {"window_size": 32}},
    "qwen2_vl": _mrope(2, 1, 1),
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 70},
    "rf_detr": {"backbone_config": _FOUR},
    "shieldgemma2": {"yes_token_index": 50, "no_token_index": 51},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "swin": _SWIN,
    "table-transformer": _DETR,
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "tipsv2_dpt": _DPT,
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "voxtral": {"audio_token_id": 95},
    "zoedepth": _DPT,
}
#: family -> the parts that its defaults lack, by the names of their configs
PARTS: dict[str, dict[str, str]] = {
    "gemma4": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
}
#: families whose defaults are no config -> what their config is made with
MADE: dict[str, dict[str, Any]] = {
    "timm_wrapper": {"architecture": "resnet10t", "num_labels": 3},
}
