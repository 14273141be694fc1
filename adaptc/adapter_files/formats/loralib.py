"""Parse state dicts of Microsoft's ``loralib``: ``encoder.fc.lora_A`` and the like, by ``loralib.lora_state_dict``.

A key is a module's path and ``lora_A`` or ``lora_B``, without ``weight``. With ``bias="lora_only"`` or ``"all"`` there
are trained biases, too. loralib's convolutions hold the layer as ``conv``, and a model without loralib does not.
Neither the alpha nor ``enable_lora`` is in the file.
"""

from __future__ import annotations

from collections.abc import Collection

from adaptc.adapter_files.formats.parts import LORALIB_A, LORALIB_B, WHOLE_BIAS, ParsedKey

_SLOTS = {"lora_A": LORALIB_A, "lora_B": LORALIB_B, "bias": WHOLE_BIAS}
_CONV = ".conv"


class Loralib:
    """The format of loralib, as the module tells."""

    name = "loralib"
    has_default_scale = False

    def parse_key(self, key: str) -> ParsedKey | None:
        module, _, end = key.rpartition(".")
        slot = _SLOTS.get(end)
        if not module or slot is None:
            return None
        names = (module, module.removesuffix(_CONV)) if end == "bias" else (module, f"{module}{_CONV}")
        return ParsedKey(key, "", tuple(dict.fromkeys(names)), slot)

    def missing_module_hint(self, module: str) -> str:
        return ""


def has_loralib_factors(keys: Collection[str]) -> bool:
    """Return whether ``keys`` have loralib's factors. AdaLoRA's keys have a third factor, and are PEFT's."""
    ends = {key.rpartition(".")[2] for key in keys if not key.startswith("base_model.")}
    return bool(ends & {"lora_A", "lora_B"}) and "lora_E" not in ends
