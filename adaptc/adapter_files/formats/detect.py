"""Detect the format of an adapter file by its keys.

The result is the format and what each key means in it. A CheckpointError names keys that no format has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from adaptc.adapter_files.formats.diffusers import Diffusers
from adaptc.adapter_files.formats.kohya import COMPONENT_PREFIXES, Kohya
from adaptc.adapter_files.formats.parts import COMPONENTS, Format, ParsedKey
from adaptc.adapter_files.formats.torchtune import Torchtune
from adaptc.adapter_files.formats.writing import Writer
from adaptc.errors import CheckpointError, short_repr

#: formats to try; of two that know equally many keys the first is taken
FORMATS: Sequence[Format] = (Kohya(), Diffusers(), Torchtune())
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
#: pieces of keys of methods that adaptc does not have
_REFUSED_METHODS = {
    "diff": "whole differences of weights",
    "diff_b": "whole differences of biases",
    "on_input": "IA3 of LyCORIS",
    "oft_blocks": "OFT of kohya",
    "oft_diag": "Diag-OFT of LyCORIS",
    "a1": "GLoRA",
    "w_norm": "trained norms of LyCORIS",
}


def is_foreign_key(key: str) -> bool:
    """Return whether ``key``, the first of a state dict, has a form that PEFT's keys never have."""
    return not key.startswith("base_model.") and (
        key.startswith(tuple(COMPONENT_PREFIXES))
        or key.endswith((".alpha", ".lora_a.weight", ".lora_b.weight", ".magnitude"))
        or any(mark in key for mark in _FOREIGN_MARKS)
    )


def starts_with_component(key: str) -> bool:
    """Return whether a key begins with the name of a component, as diffusers' keys do.

    A model's own module may have such a name, too.
    """
    return key.partition(".")[0] in COMPONENTS


def detect_format(keys: Iterable[str], source: str) -> tuple[Format, list[ParsedKey]]:
    """Return the format that knows most of the keys, with all keys parsed. Raises CheckpointError where it knows not
    all."""
    keys = list(keys)
    parsed = {f.name: [f.parse_key(k) for k in keys] for f in FORMATS}
    best = max(FORMATS, key=lambda f: sum(p is not None for p in parsed[f.name]))
    parsed_keys = [p for p in parsed[best.name] if p is not None]
    if not parsed_keys:
        raise CheckpointError(
            f"{source}: its keys are those of no format that is known ({', '.join(f.name for f in FORMATS)}, PEFT): "
            f"{short_repr(keys[:3])}. Is it an adapter?{_refused_methods_hint(keys)}"
        )
    if odd := [k for k, p in zip(keys, parsed[best.name], strict=True) if p is None]:
        raise CheckpointError(
            f"{source}: {len(odd)} of {len(keys)} keys are not known in the format {best.name}: {short_repr(odd[:3])}."
            f"{_refused_methods_hint(odd)} Drop them if they do not matter."
        )
    return best, parsed_keys


def _refused_methods_hint(keys: Sequence[str]) -> str:
    """Return a sentence that names the methods of these keys that adaptc does not have, or ''."""
    found = dict.fromkeys(w for k in keys for piece in k.split(".")[1:] if (w := _REFUSED_METHODS.get(piece)))
    return f" These are {', '.join(found)}, which adaptc does not hold." if found else ""
