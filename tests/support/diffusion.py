"""Tiny models of diffusers and CLIP, and what they are called with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import peft
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import adaptc


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=5,
        layers_per_block=1,
        block_out_channels=(8, 12),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=4,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=12,
        pooled_projection_dim=14,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=6,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=14,
        axes_dims_rope=(4, 4, 8),
    )


def clip() -> nn.Module:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    return CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=17, projection_dim=8, **sizes))


def _unet_inputs() -> dict[str, Tensor]:
    return {
        "sample": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([3.0, 9.0]),
        "encoder_hidden_states": torch.randn(2, 5, 10),
    }


def _sd3_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 3, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "pooled_projections": torch.randn(2, 14),
        "timestep": torch.tensor([3.0, 7.0]),
    }


def _flux_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 9, 6),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "pooled_projections": torch.randn(2, 14),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randn(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], list[str]]] = {
    "unet": (unet, _unet_inputs, ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "time_emb_proj", "conv_shortcut"]),
    "sd3": (sd3, _sd3_inputs, ["to_q", "to_k", "add_q_proj", "to_out.0", "proj_out", "ff.net.2"]),
    "flux": (flux, _flux_inputs, ["to_q", "to_k", "to_out.0", "proj_out"]),
    "clip": (clip, lambda: {"input_ids": torch.randint(0, 99, (2, 7))}, ["q_proj", "v_proj", "out_proj", "fc1"]),
}
#: what pipelines call them
COMPONENTS = {"unet": "unet", "sd3": "transformer", "flux": "transformer", "clip": "text_encoder"}


@lru_cache
def _build_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(5)
    make, inputs, _ = MODELS[name]
    return make().eval(), inputs()


def model(name: str) -> nn.Module:
    """A fresh copy: diffusers' loaders change the models they load into."""
    return copy.deepcopy(_build_model(name)[0])


def inputs(name: str) -> dict[str, Tensor]:
    return _build_model(name)[1]


@lru_cache
def program(name: str) -> adaptc.AdaptedProgram:
    """With LoRA at all sites that are used here; made once, as its capture takes seconds."""
    config = adaptc.LoraConfig(target_modules=MODELS[name][2])
    return adaptc.compile(model(name), config, example_inputs=inputs(name))


@torch.no_grad()
def output_tensor(subject: Any, name: str) -> Tensor:
    made = subject(**inputs(name))
    return made[0] if isinstance(made, tuple) else next(iter(made.values()))


def model_with_peft_adapter(name: str, **options: Any) -> nn.Module:
    """The model with an adapter of peft's, by diffusers' own ``add_adapter`` where it has one."""
    made = model(name)
    torch.manual_seed(8)
    options = {"r": 3, "lora_alpha": 5, "target_modules": MODELS[name][2]} | options
    config = peft.LoraConfig(init_lora_weights=False, **options)
    if name == "clip":  # transformers has a method for it too, which asks for a newer peft
        peft.inject_adapter_in_model(config, made, "default")
        made.peft_config = {"default": config}
    else:
        made.add_adapter(config)
    return made.eval()
