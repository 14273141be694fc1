"""Map the original names of FLUX and SD3 to diffusers' names, with the layers that are one in the original code.

FLUX has ``double_blocks`` and ``single_blocks``, SD3 has ``joint_blocks``. XLabs' files for FLUX name the processors of
attention, as in ``double_blocks.0.processor.qkv_lora1``. A name is there only where the model has all of its modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from adaptc.adapter_files.formats.original_layers import OriginalLayer, joined_layer, layer_with_swapped_halves

Shapes = Mapping[str, tuple[int, ...]]

_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
#: original name in a block -> diffusers' modules, whose rows follow one another
_DOUBLE_BLOCK = {
    "img_attn.qkv": _IMAGE_QKV,
    "txt_attn.qkv": _TEXT_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "processor.qkv_lora1": _IMAGE_QKV,
    "processor.qkv_lora2": _TEXT_QKV,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_SINGLE_BLOCK = {
    "linear1": (*_IMAGE_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "processor.qkv_lora": _IMAGE_QKV,
    "processor.proj_lora": ("proj_out",),
}
_JOINT_BLOCK = {
    "x_block.attn.qkv": _IMAGE_QKV,
    "context_block.attn.qkv": _TEXT_QKV,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
#: diffusers' list of blocks -> the original lists, each with the names in a block
_BLOCKS = {
    "transformer_blocks": {"double_blocks": _DOUBLE_BLOCK, "joint_blocks": _JOINT_BLOCK},
    "single_transformer_blocks": {"single_blocks": _SINGLE_BLOCK},
}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK_NAME = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\..+")
#: how dotted original names begin that no other model has
ORIGINAL_BLOCKS = ("double_blocks.", "single_blocks.", "joint_blocks.")


def original_transformer_layers(shapes: Shapes) -> dict[str, OriginalLayer]:
    """Return original name -> its layer, for a model with modules of these ``shapes``; {} for one of another kind."""
    blocks = dict.fromkeys((m[1], m[2]) for name in shapes if (m := _BLOCK_NAME.fullmatch(name)))
    if not any(f"{kind}.{i}.attn.to_q" in shapes for kind, i in blocks):
        return {}
    out: dict[str, OriginalLayer] = {}
    for kind, i in blocks:
        out |= _layers_of_block(shapes, kind, i)
    for original, module in _TOP.items():
        if (layer := joined_layer([module], shapes)) is not None:
            out[original] = layer
    if (last := layer_with_swapped_halves("norm_out.linear", shapes)) is not None:
        out["final_layer.adaLN_modulation.1"] = last
    return out


def _layers_of_block(shapes: Shapes, kind: str, index: str) -> Iterator[tuple[str, OriginalLayer]]:
    for original_list, names in _BLOCKS[kind].items():
        for original, modules in names.items():
            paths = [f"{kind}.{index}.{m}" for m in modules]
            if (layer := joined_layer(paths, shapes)) is None:
                continue
            # The text side of SD3's last block has no gate: two chunks, which the original code has the other way.
            if original == "context_block.adaLN_modulation.1" and layer.shape[0] == 2 * layer.shape[1]:
                layer = layer_with_swapped_halves(paths[0], shapes) or layer
            yield f"{original_list}.{index}.{original}", layer
