"""Rename the keys of an adapter that was written for other module names (PEFT's ``key_mapping``).

Keys are bare before and after, and no two become one. On each key the first expression that matches anywhere is
substituted, and no other is tried, as ``peft.utils.save_and_load.load_peft_weights`` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.patterns import Pattern, compile_pattern

RenameRules = Sequence[tuple[Pattern | re.Pattern[str], str]]


def compile_rules(key_mapping: Mapping[str, str] | None) -> RenameRules:
    """Return the rules in the order in which they are tried. Raises ConfigError for anything but a dict of
    expressions."""
    try:
        return [(compile_pattern("key_mapping", pattern), new) for pattern, new in (key_mapping or {}).items()]
    except (AttributeError, TypeError, RuntimeError) as exc:
        raise ConfigError(
            f"bad key_mapping: {exc}; give a dict of regular expressions and what to put in their place"
        ) from exc


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
