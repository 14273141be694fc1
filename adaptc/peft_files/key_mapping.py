"""Renaming the keys of an adapter that was written for other module names (PEFT's ``key_mapping``).

Before: bare keys, from a file or from a caller. After: bare keys, none of them twice. On each key the first expression
that matches anywhere is substituted, and no other is tried, as ``peft.utils.save_and_load.load_peft_weights`` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from adaptc.errors import CheckpointError, ConfigError, shown
from adaptc.patterns import Pattern, compiled

Rules = Sequence[tuple[Pattern | re.Pattern[str], str]]


def rules_of(key_mapping: Mapping[str, str] | None) -> Rules:
    """The rules in the order they are tried. Raises ConfigError for what is no expression, or no mapping of them."""
    try:
        return [(compiled("key_mapping", pattern), new) for pattern, new in (key_mapping or {}).items()]
    except (AttributeError, TypeError, RuntimeError) as exc:
        raise ConfigError(
            f"bad key_mapping: {exc}; give a dict of regular expressions and what to put in their place"
        ) from exc


def mapped(key: str, rules: Rules) -> str:
    """One bare key after the rules. Raises ConfigError where a replacement does not fit its expression."""
    for pattern, new in rules:
        try:
            key, hits = pattern.subn(new, key)
        except (re.error, IndexError, TypeError) as exc:
            raise ConfigError(f"key_mapping: {shown(new)} does not fit {pattern.pattern!r}: {exc}") from exc
        if hits:
            break
    return key


def renamed(keys: Mapping[str, str], rules: Rules, source: object) -> dict[str, str]:
    """``keys``: key as written -> bare key. Gives bare key after the rules -> key as written, in the same order.

    Raises CheckpointError where two keys become one, and ConfigError as :func:`mapped` does.
    """
    origin: dict[str, str] = {}
    for key, bare in keys.items():
        bare = mapped(bare, rules)
        if bare in origin:
            raise CheckpointError(
                f"{source}: keys {origin[bare]!r} and {key!r} both become {bare!r}. "
                f"{'Make the key_mapping tell them apart.' if rules else 'The file names one tensor twice.'}"
            )
        origin[bare] = key
    return origin
