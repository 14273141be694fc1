"""Rename the keys of an adapter that was written for other module names (PEFT's ``key_mapping``).

Keys are bare before and after, and no two become one. On each key the first expression that matches anywhere is
substituted, and no other is tried, as ``peft.utils.save_and_load.load_peft_weights`` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from adaptc.adapter_files.format import MODEL_LEVEL_KEYS, MODEL_PREFIX, MODULE_PREFIX
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.patterns import Pattern, compile_pattern

RenameRules = Sequence[tuple[Pattern | re.Pattern[str], str]]


def compile_rules(key_mapping: Mapping[str, str] | None) -> RenameRules:
    """Return the rules in the order in which they are tried. Raises ConfigError for a bad expression."""
    return [(compile_pattern("key_mapping", pattern), new) for pattern, new in (key_mapping or {}).items()]


def rename_key(key: str, rules: RenameRules) -> str:
    """Return one bare key after the rules. Raises ConfigError where a replacement does not fit its expression."""
    for pattern, new in rules:
        try:
            key, hits = pattern.subn(new, key)
        except (re.error, IndexError, TypeError) as exc:
            raise ConfigError(f"key_mapping: {short_repr(new)} does not fit {pattern.pattern!r}: {exc}") from exc
        if hits:
            break
    return key


def rename_bare_keys(keys: Mapping[str, str], rules: RenameRules, source: object) -> dict[str, str]:
    """Return bare key after the rules -> key as written, in the order of ``keys``, which maps key as written -> bare
    key.

    Raises CheckpointError where two keys become one, and ConfigError like :func:`rename_key`.
    """
    origin: dict[str, str] = {}
    for key, bare in keys.items():
        bare = rename_key(bare, rules)
        if bare in origin:
            raise CheckpointError(
                f"{source}: keys {origin[bare]!r} and {key!r} both become {bare!r}. "
                f"{'Make the key_mapping tell them apart.' if rules else 'The file names one tensor twice.'}"
            )
        origin[bare] = key
    return origin


def rename_tensors(
    tensors: Mapping[str, Tensor], rules: RenameRules, source: object, are_bare: bool = False
) -> dict[str, Tensor]:
    """Return ``tensors`` under their renamed keys. PEFT's prefixes are not renamed, and stay, unless keys are bare.

    Raises like :func:`rename_bare_keys`.
    """
    bare = {k: k if are_bare else _without_prefix(k) for k in tensors}
    names = rename_bare_keys(bare, rules, source)
    return {key.removesuffix(bare[key]) + new: tensors[key] for new, key in names.items()}


def _without_prefix(key: str) -> str:
    if key.startswith(MODULE_PREFIX):
        return key[len(MODULE_PREFIX) :]
    bare = key.removeprefix(MODEL_PREFIX)
    first = bare.partition(".")[0]
    return bare if any(first in keys for keys in MODEL_LEVEL_KEYS.values()) else key
