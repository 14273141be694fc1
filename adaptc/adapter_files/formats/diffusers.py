"""Parse and write diffusers' files: ``unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`` and the like.

The file is ``pytorch_lora_weights.safetensors``. Keys have PEFT's names after the name of a component. A model's own
``save_lora_adapter`` writes no component. Older files have ``lora.down``, ``lora_linear_layer.down``, or
``processor.to_q_lora.down``. The header may have the configs, as JSON under ``lora_adapter_metadata``, with each field
prefixed by its component. Without it a module's scale is 1, or follows from its ``alpha``.

Files of other programs for FLUX and SD3 have such keys, too, with the original names of modules (``mmdit``). ComfyUI
writes them behind ``diffusion_model``. XLabs has ``processor.qkv_lora1.down``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptc.adapter_files.format import to_json_value
from adaptc.adapter_files.formats.parts import (
    COMMON_SLOTS,
    COMPONENTS,
    LYCORIS_SLOTS,
    MAGNITUDE,
    WHOLE_WEIGHT,
    ParsedKey,
    split_component,
    split_key,
)
from adaptc.adapter_files.formats.writing import AdaptedModule, FileContent, rename_slots
from adaptc.errors import CheckpointError

#: names of the file in a directory
LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
#: the field of a safetensors header with the configs
LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"
#: slots that can be written, all under PEFT's names
WRITTEN_NAMES = {
    n: n for n in ("lora_A.weight", "lora_B.weight", "lora_B.bias", MAGNITUDE, *LYCORIS_SLOTS) if "hada" not in n
}
_SLOTS = {
    **COMMON_SLOTS,
    **{
        f"{old}.{way}.weight": new
        for old in ("lora", "lora_linear_layer")
        for way, new in (("down", "lora_A.weight"), ("up", "lora_B.weight"))
    },
}
#: a projection of an attention processor
_PROCESSOR_KEY = re.compile(r"(.+?)(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_PROCESSOR_SLOTS = {"down": "lora_A.weight", "up": "lora_B.weight"}
#: a projection of one of XLabs' processors for FLUX
_XLABS_KEY = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
#: a norm in FLUX's original code, whose weight is called scale
_NORM_SCALE = re.compile(r"(.+_blocks\..+\.norm\.(?:query|key)_norm)\.scale")


class Diffusers:
    """The format of diffusers, as the module tells."""

    name = "diffusers"
    has_default_scale = True

    def parse_key(self, key: str) -> ParsedKey | None:
        if old := _PROCESSOR_KEY.fullmatch(key):
            names = (f"to_{old[3]}.0" if old[3] == "out" else f"to_{old[3]}", f"{old[3]}_proj")
            names, slot = tuple(f"{old[1]}.{n}" for n in names), _PROCESSOR_SLOTS[old[4]]
        elif old := _XLABS_KEY.fullmatch(key):
            names, slot = (old[1],), _PROCESSOR_SLOTS[old[2]]
        elif old := _NORM_SCALE.fullmatch(key):
            names, slot = (old[1],), WHOLE_WEIGHT
        elif found := split_key(key, _SLOTS):
            # A processor's `to_out` is the first layer of the list of that name.
            name, slot = found[0].replace(".processor.", "."), found[1]
            names = (name, f"{name}.0") if name.endswith(".to_out") else (name,)
        else:
            return None
        component = split_component(names[0])[0]
        return ParsedKey(key, component, names, slot)

    def missing_module_hint(self, module: str) -> str:
        return ""

    def resolve_path(self, path: Path) -> Path:
        return path if path.suffix == ".safetensors" else path / LORA_WEIGHT_NAME_SAFE

    def file_content(
        self, modules: Sequence[AdaptedModule], component: str | None, config: Mapping[str, Any], names: Sequence[str]
    ) -> FileContent:
        if component is not None and component not in COMPONENTS:
            raise CheckpointError(
                f"component={component!r} is none that diffusers has: {', '.join(COMPONENTS)}; or leave it out, as "
                f"for a "
                "model's own load_lora_adapter(..., prefix=None)"
            )
        front = f"{component}." if component else ""
        out = {
            f"{front}{one.module}.{name}": t
            for one in modules
            for name, t in rename_slots(self.name, WRITTEN_NAMES, one).items()
        }
        fields = {f"{front}{k}": v for k, v in config.items()}
        return FileContent(out, {LORA_ADAPTER_METADATA_KEY: json.dumps(fields, indent=2, default=to_json_value)})
