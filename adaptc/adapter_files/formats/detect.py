"""Detect the format of an adapter file by its keys.

The result is the format and what each key means in it. A CheckpointError names keys that no format has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from adaptc.adapter_files.formats.diffusers import Diffusers
from adaptc.adapter_files.formats.kohya import COMPONENT_PREFIXES, Kohya
from adaptc.adapter_files.formats.loralib import Loralib, has_loralib_factors
from adaptc.adapter_files.formats.mmdit import ORIGINAL_BLOCKS
from adaptc.adapter_files.formats.parts import COMPONENTS, Format, ParsedKey
from adaptc.adapter_files.formats.torchtune import Torchtune
from adaptc.adapter_files.formats.writing import Writer
from adaptc.errors import CheckpointError, short_repr

LORALIB = Loralib()
#: formats to try; of two that know equally many keys the first is taken
FORMATS: Sequence[Format] = (Kohya(), Diffusers(), Torchtune(), LORALIB)
#: formats that can be written, by the name that users give
WRITERS: Mapping[str, Writer] = MappingProxyType({w.name: w for w in (Kohya(), Diffusers())})
#: pieces of keys that no key of PEFT's has
_FOREIGN_MARKS = (
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
    ".lora.up.",
    "_lora.down.",
    "_lora.up.",
    ".lora_linear_layer.",
)
#: ends of keys that no key of PEFT's has
_FOREIGN_ENDS = (".alpha", ".lora_a.weight", ".lora_b.weight", ".magnitude", ".diff", ".diff_b", ".w_norm", ".b_norm")
#: pieces of keys of methods that adaptc does not have -> the method, and why
_REFUSED_METHODS = {
    "oft_blocks": "OFT of kohya and LyCORIS, which turns a layer's outputs where PEFT's OFT turns its inputs",
    "oft_diag": "Diag-OFT of LyCORIS, which turns a layer's outputs where PEFT's OFT turns its inputs",
    "a1": "GLoRA of LyCORIS, which multiplies the weight by a matrix where PEFT's GLoRA multiplies its entries",
}


def is_foreign_key(key: str) -> bool:
    """Return whether ``key``, the first of a state dict, has a form that PEFT's keys never have."""
    return not key.startswith("base_model.") and (
        key.startswith(tuple(COMPONENT_PREFIXES))
        or key.endswith(_FOREIGN_ENDS)
        or any(mark in key for mark in _FOREIGN_MARKS)
    )


def starts_with_component(key: str) -> bool:
    """Return whether a key begins as diffusers' or ComfyUI's keys do: with the name of a component, or a list of blocks
    of an original code.

    A model's own module may have such a name, too.
    """
    return key.partition(".")[0] in COMPONENTS or key.startswith(ORIGINAL_BLOCKS)


def detect_format(keys: Iterable[str], source: str) -> tuple[Format, list[ParsedKey]]:
    """Return the format that knows most of the keys, with all keys parsed. Raises CheckpointError where it knows not
    all."""
    keys = tuple(keys)
    best, found = _parse(keys)
    parsed_keys = [p for p in found if p is not None]
    if not parsed_keys:
        raise CheckpointError(
            f"{source}: its keys are those of no format that is known ({', '.join(f.name for f in FORMATS)}, PEFT): "
            f"{short_repr(keys[:3])}. {_refused_methods_hint(keys) or 'Is it an adapter?'}"
        )
    if odd := [k for k, p in zip(keys, found, strict=True) if p is None]:
        raise CheckpointError(
            f"{source}: {len(odd)} of {len(keys)} keys are not known in the format {best.name}: {short_repr(odd[:3])}. "
            f"{_refused_methods_hint(odd) or 'Drop them if they do not matter.'}"
        )
    return best, parsed_keys


# Several questions are asked about one file, and files of one kind have the same keys.
@functools.lru_cache(maxsize=16)
def _parse(keys: tuple[str, ...]) -> tuple[Format, tuple[ParsedKey | None, ...]]:
    """Return the format that knows most of the keys, and what it makes of each: None of one that it does not know."""
    # A model's own state dict has biases, too: without loralib's factors they are no format's.
    formats = [f for f in FORMATS if f is not LORALIB or has_loralib_factors(keys)]
    parsed = [tuple(f.parse_key(k) for k in keys) for f in formats]
    return max(zip(formats, parsed, strict=True), key=lambda found: sum(p is not None for p in found[1]))


def _refused_methods_hint(keys: Sequence[str]) -> str:
    """Return a sentence that names the methods of these keys that adaptc does not have, or ''."""
    found = dict.fromkeys(w for k in keys for piece in k.split(".")[1:] if (w := _REFUSED_METHODS.get(piece)))
    if not found:
        return ""
    return (
        f"These are of {'; '.join(found)}. Merge the file with the program that wrote it, and make LoRA of the merged "
        "model: adaptc.subtract_adapter(merged, model, rank=r)."
    )
