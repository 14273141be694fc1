"""The rule by which PEFT looks up ``n_frequency_pattern`` of FourierFT and ``block_size_pattern`` of C3A.

It is not that of ``rank_pattern`` (``adaptc.rules``): a key is a regular expression for what follows a dot in the name,
an alternation in it is not kept together, and the whole name counts only where no expression matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from adaptc.errors import ConfigError

T = TypeVar("T")


def dotted_value(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value of the first key that matches the module ``name``. Raises ConfigError for a bad expression."""
    pattern = pattern or {}
    key = next((k for k in pattern if _rule(k).match(name)), name)
    return pattern.get(key, default)


def dotted_match(key: str, name: str) -> bool:
    """Whether a key of such a table is for the module ``name``."""
    return key == name or _rule(key).match(name) is not None


@lru_cache(maxsize=4096)
def _rule(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf".*\.{key}$")
    except re.error as e:
        raise ConfigError(f"{key!r} is not a valid regular expression ({e})") from None
