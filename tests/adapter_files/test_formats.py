"""What keys of other formats say, without a model; and which file of a directory is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from safetensors.torch import save_file
from torch import nn

from adaptc.adapter_files.adapter_data import FILE_KEYS
from adaptc.adapter_files.atomic_write import open_stage
from adaptc.adapter_files.formats.detect import detect_format, is_foreign_key, starts_with_component
from adaptc.adapter_files.formats.ldm import original_names
from adaptc.adapter_files.load import load
from adaptc.errors import CheckpointError
from tests.support.adapter_files import some_tensors

KEYS = {
    "kohya": {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ("unet", "lora_A.weight"),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": ("text_encoder", "lora_B.weight"),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ("text_encoder", "alpha"),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.dora_scale": ("text_encoder_2", "dora_scale"),
        "lora_transformer_proj_out.lora_down.weight": ("transformer", "lora_A.weight"),
        "lycoris_proj_out.hada_w1_a": ("", "hada_w1_a"),
        "lora_unet_conv_in.lora_mid.weight": ("unet", "lora_mid.weight"),
        "lora_unet_conv_in.lokr_t2": ("unet", "lokr_t2"),
    },
    "diffusers": {
        "unet.conv_in.lora_A.weight": ("unet", "lora_A.weight"),
        "transformer.proj_out.lora_B.weight": ("transformer", "lora_B.weight"),
        "transformer.proj_out.alpha": ("transformer", "alpha"),
        "text_encoder_2.text_projection.lora.down.weight": ("text_encoder_2", "lora_A.weight"),
        "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight": ("text_encoder", "lora_B.weight"),
        "unet.a.attn1.processor.to_out_lora.up.weight": ("unet", "lora_B.weight"),
        "a.attn1.processor.to_q_lora.down.weight": ("", "lora_A.weight"),
        "proj_out.lora_magnitude_vector": ("", "lora_magnitude_vector"),
    },
    "torchtune": {
        "layers.0.attn.q_proj.lora_a.weight": ("", "lora_A.weight"),
        "layers.0.mlp.w1.lora_b.weight": ("", "lora_B.weight"),
        "layers.0.mlp.w1.magnitude": ("", "lora_magnitude_vector"),
    },
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_say_component_and_slot(name: str) -> None:
    form, parts = detect_format(KEYS[name], "file")
    assert form.name == name
    assert {p.key: (p.component, p.slot) for p in parts} == KEYS[name]


def test_pefts_keys_are_not_taken_for_others() -> None:
    for key in (
        "base_model.model.unet.x.lora_A.weight",
        "layers.0.q_proj.lora_A.weight",
        "classifier.weight",
        "a.ia3_l",
    ):
        assert not is_foreign_key(key)
        assert not starts_with_component(key)
    assert all(
        is_foreign_key(k) or starts_with_component(k)
        for keys in KEYS.values()
        for k in keys
        if k != "proj_out.lora_magnitude_vector"
    )


def sd(**options: object) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4, **options)


UNETS = {
    "one layer": lambda: sd(
        layers_per_block=1,
        block_out_channels=(8, 12),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    # Of the four blocks that Stable Diffusion 1.5 has, diffusers' converter takes the tenth layer for the first.
    "sd 1.5": lambda: sd(
        block_out_channels=(8, 12, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sdxl": lambda: sd(
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20,
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_original_names_are_those_of_diffusers_converter(name: str) -> None:
    model = UNETS[name]()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    original = original_names(layers)
    assert sorted(original.values()) == sorted(layers)
    keys = {f"lora_unet_{spelled.replace('.', '_')}.lora_down.weight": n for spelled, n in original.items()}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(keys), model.config)
    wrong = []
    for key, module in mapped.items():
        theirs = _convert_unet_lora_key(key).removesuffix(".weight").removesuffix(".lora.down").removesuffix(".down")
        theirs = theirs.replace(".processor", "").replace("_lora", "").removesuffix(".lora")
        if theirs not in (module, module.removesuffix(".0")):
            wrong.append((key, theirs, module))
    # diffusers takes the upsampler behind layers without attention for an attention, and nothing has that name.
    assert all(module == "up_blocks.0.upsamplers.0.conv" for _, _, module in wrong), wrong


def test_known_names() -> None:
    """As it is in files people have."""
    original = original_names([n for n, _ in UNETS["sdxl"]().named_modules()])
    assert original["input_blocks.4.1.transformer_blocks.0.attn1.to_q"] == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    assert original["output_blocks.2.2.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert original["input_blocks.3.0.op"] == "down_blocks.0.downsamplers.0.conv"
    assert original["middle_block.1.proj_in"] == "mid_block.attentions.0.proj_in"
    four = sd(block_out_channels=(8, 12, 16, 20)).named_modules()
    layers = [n for n, m in four if isinstance(m, (nn.Linear, nn.Conv2d))]
    original = original_names(layers)
    assert sorted(original.values()) == sorted(layers)
    assert original["input_blocks.10.0.in_layers.2"] == "down_blocks.3.resnets.0.conv1"
    assert original["output_blocks.2.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert original["output_blocks.11.1.proj_out"] == "up_blocks.3.attentions.2.proj_out"


def test_while_a_directory_is_written_nothing_else_in_it_is_the_adapter(tmp_path: Path) -> None:
    """Trainer has a second name for the weights, which is the old ones' until the write is done."""
    save_file(some_tensors(), tmp_path / "model.safetensors")
    assert load(tmp_path).format == FILE_KEYS
    with open_stage(tmp_path), pytest.raises(CheckpointError, match="being written"):
        load(tmp_path)
    assert load(tmp_path).format == FILE_KEYS
