"""Parse torchtune's own checkpoints (``adapter_0.pt``): ``layers.0.attn.q_proj.lora_a.weight`` and the like.

torchtune also writes PEFT's files, for models in transformers' layout. Its own checkpoints are for its own modules.
They fit transformers' modules where only the names differ. Query and key projections have another row order there,
which depends on the number of heads. So these are not renamed.
"""

from __future__ import annotations

import re

from adaptc.adapter_files.formats.parts import MAGNITUDE, ParsedKey, split_key

_SLOTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": MAGNITUDE}
_LAYER = re.compile(r"layers\.(\d+)\.(attn|mlp)\.(\w+)")
_TRANSFORMERS_NAMES = {
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


class Torchtune:
    """The format of torchtune, as the module tells."""

    name = "torchtune"
    has_default_scale = False

    def parse_key(self, key: str) -> ParsedKey | None:
        found = split_key(key, _SLOTS)
        if found is None:
            return None
        name, slot = found
        names = [name]
        if m := _LAYER.fullmatch(name):
            theirs = _TRANSFORMERS_NAMES.get(f"{m[2]}.{m[3]}")
            names += [f"model.layers.{m[1]}.{theirs}"] if theirs else []
        elif name == "output":
            names.append("lm_head")
        return ParsedKey(key, "", tuple(names), slot)

    def missing_module_hint(self, module: str) -> str:
        if module.endswith((".q_proj", ".k_proj")):
            return (
                "torchtune has the rows of q_proj and k_proj in another order than transformers. Use the directory "
                "with "
                "adapter_model.safetensors, which torchtune writes in PEFT's format."
            )
        return ""
