"""Parse and write files of kohya's sd-scripts, LyCORIS and OneTrainer.

Keys look like ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``. A module's path has underscores for
dots, after a prefix that names the component. Each module has ``lora_down``, ``lora_up`` and an ``alpha``. A
convolution may have ``lora_mid``, and DoRA has ``dora_scale``. LyCORIS adds LoHa (``hada_*``), LoKr (``lokr_*``), IA3
(``weight`` and ``on_input``), whole changes (``diff``, ``diff_b``) and those of norms (``w_norm``, ``b_norm``). Models
are named as in diffusers, or by the blocks of the original code (``ldm`` for UNets, ``mmdit`` for FLUX and SD3).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.formats.parts import (
    ALPHA,
    CHANNELS,
    COMMON_SLOTS,
    DORA_SCALE,
    LORA_MID,
    LYCORIS_SLOTS,
    MAGNITUDE,
    ON_INPUT,
    ParsedKey,
    split_key,
)
from adaptc.adapter_files.formats.writing import AdaptedModule, FileContent, rename_slots
from adaptc.errors import CheckpointError

#: prefix -> component; a prefix that begins with another one comes before it
COMPONENT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_prior_unet_": "unet",
    "lycoris_": "",
}
#: component -> the prefix under which it is written
WRITTEN_PREFIXES = {c: p for p, c in reversed(COMPONENT_PREFIXES.items()) if p not in ("lora_te_", "lora_prior_unet_")}
#: PEFT's name -> the name that is written
WRITTEN_NAMES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    MAGNITUDE: DORA_SCALE,
    **LYCORIS_SLOTS,
}
_SLOTS = {
    **COMMON_SLOTS,
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_mid.weight": LORA_MID,
    DORA_SCALE: DORA_SCALE,
    "weight": CHANNELS,
    "on_input": ON_INPUT,
}
_TEXT_MODEL, _ENCODER_LAYERS = "text_model_", "encoder.layers."
_ORIGINAL_NAME = re.compile(r"(^|_)(double_blocks|single_blocks|joint_blocks|double_stream|x_block|qkv)(_|$)")


class Kohya:
    """The format of kohya, as the module tells. A file that is read may have several components; one that is written
    has one."""

    name = "kohya"
    has_default_scale = True

    def parse_key(self, key: str) -> ParsedKey | None:
        prefix = next((p for p in COMPONENT_PREFIXES if key.startswith(p)), None)
        found = split_key(key, _SLOTS)
        if prefix is None or found is None or "." in found[0]:
            return None
        return ParsedKey(key, COMPONENT_PREFIXES[prefix], (found[0].removeprefix(prefix),), found[1], is_flattened=True)

    def missing_module_hint(self, module: str) -> str:
        if _ORIGINAL_NAME.search(module):
            return (
                "These are names of the original code of a model that adaptc does not know, or the file is for another "
                "model. diffusers converts many such files: give what its pipeline's lora_state_dict(file) returns as "
                "a state dict."
            )
        return ""

    def resolve_path(self, path: Path) -> Path:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"the format kohya is a single file: give a path that ends in .safetensors, not {path}"
            )
        return path

    def file_content(
        self, modules: Sequence[AdaptedModule], component: str | None, config: Mapping[str, Any], names: Sequence[str]
    ) -> FileContent:
        if component not in WRITTEN_PREFIXES:
            raise CheckpointError(
                f"the format kohya has the component in every key: say component=, one of "
                f"{', '.join(filter(None, WRITTEN_PREFIXES))}"
            )
        spelled = Counter(n.replace(".", "_") for n in names)
        tensors: dict[str, Tensor] = {}
        for adapted in modules:
            if spelled[flat := adapted.module.replace(".", "_")] > 1:
                raise CheckpointError(
                    f"the format kohya cannot tell {adapted.module!r} from another module, as it has underscores for "
                    f"dots. Write "
                    "it as format='peft' or 'diffusers'."
                )
            # transformers dropped the outer name of text encoders, and other programs still use it.
            outer = (
                _TEXT_MODEL
                if component.startswith("text_encoder") and adapted.module.startswith(_ENCODER_LAYERS)
                else ""
            )
            key = f"{WRITTEN_PREFIXES[component]}{outer}{flat}"
            for name, t in rename_slots(self.name, WRITTEN_NAMES, adapted).items():
                tensors[f"{key}.{name}"] = _add_axes(t, adapted) if name == DORA_SCALE else t
            tensors[f"{key}.{ALPHA}"] = _alpha_for_scale(adapted)
        return FileContent(tensors, {})


def _add_axes(t: Tensor, adapted: AdaptedModule) -> Tensor:
    """Return the magnitudes (rows,) as (rows, 1, ...), with as many axes as the weight has."""
    axes = adapted.tensors["lora_A.weight"].ndim
    return t.reshape(-1, *[1] * (axes - 1))


def _alpha_for_scale(adapted: AdaptedModule) -> Tensor:
    """Return the alpha that, divided by the rank that a reader sees, is exactly the scale.

    Raises CheckpointError where there is no such number.
    """
    if {"lokr_w1", "lokr_w2"} <= adapted.tensors.keys():
        if adapted.scale != 1:
            raise CheckpointError(
                f"the format kohya cannot hold the scale {adapted.scale} of {adapted.module!r}: a LoKr of two whole "
                "factors is not scaled there. Write it as format='peft'."
            )
        return torch.tensor(float(max(adapted.tensors["lokr_w2"].shape[:2])))
    alpha = adapted.scale * adapted.rank
    if alpha / adapted.rank != adapted.scale:
        raise CheckpointError(
            f"the format kohya cannot hold the scale {adapted.scale} of {adapted.module!r}, as no alpha over the rank "
            f"{adapted.rank} is "
            "it to the bit (with use_rslora it is over the root). Write it as format='peft'."
        )
    small = torch.tensor(alpha, dtype=torch.float32)
    return small if small.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
