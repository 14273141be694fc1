"""What formats have in common: a key of a file as component, module and slot, and the protocol of a format.

Before: keys as a file has them. After: for each key a :class:`Part`, whose ``slot`` has PEFT's name; or None, and
whoever asked names the key in an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

#: the scale of a module times its rank, one number
ALPHA = "alpha"
#: the middle one of three factors of a convolution
MID = "lora_mid.weight"
MAGNITUDE = "lora_magnitude_vector"
#: the same, with an axis for each axis of the weight
DORA_SCALE = "dora_scale"

#: the parts of a pipeline that files have adapters of, as diffusers names them
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

#: slots of LoHa and LoKr, whose names are LyCORIS's in every format
LYCORIS: Mapping[str, str] = MappingProxyType(
    {
        name: name
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    }
)
#: the end of a key -> PEFT's name of the tensor
SLOTS: Mapping[str, str] = MappingProxyType(
    {
        "lora_A.weight": "lora_A.weight",
        "lora_B.weight": "lora_B.weight",
        "lora_B.bias": "lora_B.bias",
        "lora_magnitude_vector": MAGNITUDE,
        "lora_magnitude_vector.weight": MAGNITUDE,
        "alpha": ALPHA,
        **LYCORIS,
    }
)


@dataclass(frozen=True)
class Part:
    """A key of a file. ``modules``: how its module may be called, the likeliest name first; with ``flat`` in names
    whose dots have become underscores. ``component``: of a pipeline, '' where the key does not say."""

    key: str
    component: str
    modules: tuple[str, ...]
    slot: str
    flat: bool = False


class Format(Protocol):
    """One way to name the tensors of an adapter."""

    @property
    def name(self) -> str:
        """As reports and errors call it."""
        ...

    @property
    def scale_is_one(self) -> bool:
        """Whether a module without an alpha has the scale 1; otherwise files do not say what the scale is."""
        ...

    def part(self, key: str) -> Part | None:
        """What a key says; None for one that this format does not have."""
        ...

    def way_out(self, module: str) -> str:
        """A sentence for the error that no module of the model is called so; '' where there is no more to say."""
        ...


def split(key: str, slots: Mapping[str, str]) -> tuple[str, str] | None:
    """(the rest of the key, PEFT's name of the slot) by the longest end that ``slots`` has."""
    pieces = key.split(".")
    for n in (3, 2, 1):
        slot = slots.get(".".join(pieces[-n:])) if len(pieces) > n else None
        if slot is not None:
            return ".".join(pieces[:-n]), slot
    return None


def component_of(name: str) -> tuple[str, str]:
    """(component, the rest) of a dotted name; '' and the name where its first part is none."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in COMPONENTS and rest else ("", name)
