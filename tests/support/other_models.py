"""Tiny models of several inputs and of other libraries than transformers: CLIP, SAM, denoisers, timm, open_clip.

Nothing is downloaded. ``build()`` gives the model anew from a fixed seed, in eval mode, with every parameter perturbed;
``inputs(n)`` its keyword inputs for a batch of n, or a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.families import perturb


@dataclass(frozen=True)
class MultiInputModel:
    """``targets``: for a LoRA. ``cached_model``: adaptc makes the inputs itself."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: list[str] = field(default_factory=list)
    cached_model: bool = True

    def build(self) -> Any:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries and their defaults: none of it is about adaptc
            model = self.make().eval()
        perturb(model)
        return model


def _random(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random(sum(shape)))


def _ids(n: int, length: int) -> Tensor:
    return torch.randint(3, 53, (n, length), generator=_random(n))


_LAYERS = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3}
_TEXT = {**_LAYERS, "vocab_size": 53, "max_position_embeddings": 19}
_CLIP_TEXT = {**_TEXT, "projection_dim": 11, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_IMAGE = {**_LAYERS, "image_size": 14, "patch_size": 7}
_CLIP_IMAGE = {**_IMAGE, "projection_dim": 11}


def transformers_model(name: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return make


def _text(n: int) -> dict[str, Tensor]:
    ids = _ids(n, n + 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(n: int) -> dict[str, Tensor]:
    return {"pixel_values": _floats(n, 3, 14, 14)}


_SAM = {
    "vision_config": {
        "hidden_size": 24,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "mlp_dim": 37,
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
_WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 35,
    "vocab_size": 53,
    "num_mel_bins": 11,
    "max_source_positions": 13,
    "max_target_positions": 17,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _unet(**more: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=5,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )


def _unet_inputs(n: int) -> dict[str, Any]:
    step = torch.tensor(n)
    return {"sample": _floats(n, 4, 8, 4 * n), "timestep": step, "encoder_hidden_states": _floats(n, n + 3, 12)}


def _sdxl() -> nn.Module:
    time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return _unet(**time, projection_class_embeddings_input_dim=6 * 8 + 11)


def _sdxl_inputs(n: int) -> dict[str, Any]:
    return {**_unet_inputs(n), "added_cond_kwargs": {"text_embeds": _floats(n, 11), "time_ids": _floats(n, 6)}}


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=11,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def _flux_inputs(n: int) -> dict[str, Any]:
    return {
        "hidden_states": _floats(n, 9 + n, 4),
        "encoder_hidden_states": _floats(n, 5 + n, 12),
        "pooled_projections": _floats(n, 11),
        "timestep": _floats(n).sigmoid(),
        "guidance": _floats(n),
        "img_ids": _floats(9 + n, 3),
        "txt_ids": _floats(5 + n, 3),
    }


def _timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7, **more)

    return make


def _open_clip() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 9, "vocab_size": 53, "width": 24, "heads": 3, "layers": 2}
    return CLIP(embed_dim=11, vision_cfg=vision, text_cfg=text)


_SIGLIP_TEXT = {**_TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_QV = ["q_proj", "v_proj"]

MODELS: dict[str, MultiInputModel] = {
    "clip": MultiInputModel(
        transformers_model(
            "CLIPModel", "CLIPConfig", text_config=_CLIP_TEXT, vision_config=_CLIP_IMAGE, projection_dim=11
        ),
        lambda n: {**_text(n), **_image(n + 1)},
        _QV,
    ),
    "clip_text": MultiInputModel(transformers_model("CLIPTextModel", "CLIPTextConfig", **_CLIP_TEXT), _text, _QV),
    "clip_vision": MultiInputModel(
        transformers_model("CLIPVisionModel", "CLIPVisionConfig", **_CLIP_IMAGE), _image, _QV
    ),
    "siglip": MultiInputModel(
        transformers_model("SiglipModel", "SiglipConfig", text_config=_SIGLIP_TEXT, vision_config=_IMAGE),
        lambda n: {**_text(n), **_image(n + 1)},
        _QV,
    ),
    "sam": MultiInputModel(
        transformers_model("SamModel", "SamConfig", **_SAM), lambda n: {"pixel_values": _floats(n, 3, 32, 32)}, ["qkv"]
    ),
    "whisper": MultiInputModel(
        transformers_model("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        lambda n: {"input_features": _floats(n, 11, 26), "decoder_input_ids": _ids(n, n + 2)},
        _QV,
    ),
    "unet": MultiInputModel(_unet, _unet_inputs, ["to_q", "to_v", "conv1"]),
    "sdxl": MultiInputModel(_sdxl, _sdxl_inputs, ["to_q", "to_v"]),
    "flux": MultiInputModel(_flux, _flux_inputs, ["to_q", "to_v"]),
    "timm_vit": MultiInputModel(
        _timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3),
        lambda n: _floats(n, 3, 32, 32),
        ["qkv", "fc1"],
        cached_model=False,
    ),
    "timm_resnet": MultiInputModel(
        _timm("resnet10t"), lambda n: _floats(n, 3, 32, 32), ["conv2", "fc"], cached_model=False
    ),
    "open_clip": MultiInputModel(
        _open_clip,
        lambda n: {"image": _floats(n, 3, 16, 16), "text": _ids(n, 9)},
        ["c_fc", "c_proj"],
        cached_model=False,
    ),
}
