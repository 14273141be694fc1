"""Define what all formats share: the parsed key of a file, and the protocol of a format.

A key becomes a :class:`ParsedKey` with component, module and slot, whose slot has PEFT's name. Where a key is unknown
the result is None, and the caller names the key in an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

#: slot of a module's scale times its rank, one number
ALPHA = "alpha"
#: slot of the middle one of a convolution's three factors
LORA_MID = "lora_mid.weight"
MAGNITUDE = "lora_magnitude_vector"
#: slot of DoRA's magnitudes with an axis for each axis of the weight
DORA_SCALE = "dora_scale"

#: slots of changes of a module's weight and bias, which are added to the base
DIFF, DIFF_BIAS = "diff", "diff_b"
#: slots of a module's own weight and bias, which replace the base's
WHOLE_WEIGHT, WHOLE_BIAS = "whole weight", "whole bias"
#: slots of LyCORIS's IA3: a factor less one for each channel, and whether the channels are those of the input
CHANNELS, ON_INPUT = "ia3_channels", "ia3_on_input"
#: slots of loralib's factors, which have shapes of their own at convolutions and merged layers
LORALIB_A, LORALIB_B = "loralib_A", "loralib_B"

#: components of a pipeline that adapter files may have, by diffusers' names
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "controlnet",
    "diffusion_model",
)

#: slots of LoHa and LoKr, which have LyCORIS's names in every format
LYCORIS_SLOTS: Mapping[str, str] = MappingProxyType(
    {
        name: name
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    }
)
#: end of a key -> PEFT's name of the tensor
COMMON_SLOTS: Mapping[str, str] = MappingProxyType(
    {
        "lora_A.weight": "lora_A.weight",
        "lora_B.weight": "lora_B.weight",
        "lora_B.bias": "lora_B.bias",
        "lora_magnitude_vector": MAGNITUDE,
        "lora_magnitude_vector.weight": MAGNITUDE,
        "alpha": ALPHA,
        **LYCORIS_SLOTS,
        "diff": DIFF,
        "diff_b": DIFF_BIAS,
        "w_norm": DIFF,
        "b_norm": DIFF_BIAS,
    }
)


@dataclass(frozen=True)
class ParsedKey:
    """The parsed key of a file.

    ``module_names`` are the possible names of its module, the likeliest first. With ``is_flattened`` their dots have
    become underscores. ``component`` is that of a pipeline, '' where the key names none. ``slot`` is PEFT's name of the
    tensor.
    """

    key: str
    component: str
    module_names: tuple[str, ...]
    slot: str
    is_flattened: bool = False


class Format(Protocol):
    """A way to name the tensors of an adapter."""

    @property
    def name(self) -> str:
        """Return the name that reports and errors use."""
        ...

    @property
    def has_default_scale(self) -> bool:
        """Return whether a module without an alpha has the scale 1. Where it is False, such files do not state the
        scale."""
        ...

    def parse_key(self, key: str) -> ParsedKey | None:
        """Return the parsed key, or None for one that this format does not have."""
        ...

    def missing_module_hint(self, module: str) -> str:
        """Return a sentence for the error that the model has no such module, or '' where there is nothing to add."""
        ...


def split_key(key: str, slots: Mapping[str, str]) -> tuple[str, str] | None:
    """Return (rest of the key, PEFT's name of the slot) by the longest ending that is in ``slots``, or None."""
    pieces = key.split(".")
    for n in (3, 2, 1):
        slot = slots.get(".".join(pieces[-n:])) if len(pieces) > n else None
        if slot is not None:
            return ".".join(pieces[:-n]), slot
    return None


def split_component(name: str) -> tuple[str, str]:
    """Return (component, rest) of a dotted name, or ('', ``name``) where its first part is no component."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in COMPONENTS and rest else ("", name)
