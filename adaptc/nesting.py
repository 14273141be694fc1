"""Tell lists and dicts that are nested too deep for a config. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: the depth to which lists and dicts may be nested where an annotation says nothing of them
MAX_DEPTH = 32
#: what counts as a list
LIST_TYPES = (list, tuple, set, frozenset)


def is_nested_too_deep(value: Any, depth_left: int = MAX_DEPTH) -> bool:
    """Return whether lists and dicts are nested deeper than they may be in a config."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, LIST_TYPES):
        return False
    return depth_left <= 0 or any(is_nested_too_deep(v, depth_left - 1) for v in value)
