"""Map the original names of Stable Diffusion's UNets to diffusers' names.

The original code numbers its blocks consecutively: ``input_blocks.4.1`` is the attention of one of them, then come
``middle_block`` and ``output_blocks``. The number of layers in a block is read off the names that exist. kohya writes
files with these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_SINGLE_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_names(modules: Collection[str]) -> dict[str, str]:
    """Return original name -> diffusers' name of the modules that have one; empty for a model that is no such UNet."""
    layers = {"down": _layers_per_block(modules, "down"), "up": _layers_per_block(modules, "up")}
    if not all(layers.values()):
        return {}
    attention_blocks = {
        int(m[2]) for name in modules if (m := _BLOCK.fullmatch(name)) and m[1] == "up" and m[3] == "attentions"
    }
    out: dict[str, str] = {}
    for name in modules:
        if name in _SINGLE_LAYERS:
            out[_SINGLE_LAYERS[name]] = name
        elif m := _MIDDLE.fullmatch(name):
            place = 2 * int(m[2]) + (m[1] == "attentions")
            out[f"middle_block.{place}.{_original_inner_name(m[1], m[3])}"] = name
        elif m := _BLOCK.fullmatch(name):
            direction, block, kind, layer = m[1], int(m[2]), m[3], int(m[4])
            # A downsampler is an input block of its own. An upsampler is the last module of its level's last output
            # block.
            first = 1 + block * (layers["down"] + 1) if direction == "down" else block * layers["up"]
            if kind == "downsamplers":
                out[f"input_blocks.{first + layers['down']}.0.op"] = name
            elif kind == "upsamplers":
                out[f"output_blocks.{first + layers['up'] - 1}.{1 + (block in attention_blocks)}.{m[5]}"] = name
            else:
                side = "input" if direction == "down" else "output"
                out[f"{side}_blocks.{first + layer}.{int(kind == 'attentions')}.{_original_inner_name(kind, m[5])}"] = (
                    name
                )
    return out


def _original_inner_name(kind: str, name: str) -> str:
    return _RESNET_LAYERS.get(name, name) if kind == "resnets" else name


def _layers_per_block(modules: Collection[str], direction: str) -> int:
    found = (m for name in modules if (m := _BLOCK.fullmatch(name)) and m[1] == direction and m[3] == "resnets")
    return max((int(m[4]) + 1 for m in found), default=0)
