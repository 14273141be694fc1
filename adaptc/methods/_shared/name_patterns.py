"""Look up per-module options by PEFT's two rules for tables whose keys are regular expressions.

``rank_pattern`` and its like: a key matches the end of a module name, starting at a dot or at the front.

``n_frequency_pattern`` of FourierFT and ``block_size_pattern`` of C3A (the functions ``dotted_*``): a key matches the
part of a name behind some dot. It is not put in parentheses, so an alternation in it splits the whole expression. A key
that equals the whole name counts only where no expression matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from adaptc.errors import MAX_LISTED, EntryHandler, and_more, did_you_mean, refuse_entry
from adaptc.patterns import FEW_KEYS, Pattern, candidate_keys, compile_pattern, matches_pattern

T = TypeVar("T")
V = TypeVar("V")

#: the most keys a table may have; no model has as many modules
MAX_KEYS = 100_000


def unused_patterns(
    pattern: Mapping[str, object] | None, names: Iterable[str], matches: Callable[[str, str], bool] | None = None
) -> list[str]:
    """Return the keys of ``pattern`` that match none of ``names``, in order.

    ``matches(key, name)``: the option's rule, where it is not that of ``rank_pattern``.
    """
    names = list(names)
    if matches is not None or len(pattern or {}) < FEW_KEYS:
        return [key for key in pattern or {} if not any((matches or matches_pattern)(key, n) for n in names)]
    keys = tuple(pattern or {})
    left = dict.fromkeys(keys)
    for name in names:
        for key in candidate_keys(keys, name):
            if key in left and matches_pattern(key, name):
                del left[key]
    return list(left)


def check_patterns(
    option: str,
    pattern: Mapping[str, object] | None,
    names: Sequence[str],
    matches: Callable[[str, str], bool] | None = None,
    tell: EntryHandler = refuse_entry,
) -> None:
    """Call ``tell`` with a message where a key of ``pattern`` matches no adapted module; by default, raise TargetError.

    ``option``: the name of the option; ``names``: the adapted modules. ``matches(key, name)``: the option's rule, where
    it is not that of ``rank_pattern``.
    """
    unused = unused_patterns(pattern, names, matches)
    if unused:
        hints = [f"{key!r} matches no adapted module{did_you_mean(key, names)}" for key in unused[:MAX_LISTED]]
        tell(f"{option}: " + "; ".join(hints) + and_more(unused))


def default_and_pattern(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Return the most frequent of ``values`` (module name -> value), and PEFT's table of the other values.

    In that table the first key that matches the end of a name wins, so longer names come first. A module with the most
    frequent value is in the table, too, where its name ends with that of a module with another value.
    """
    (most, _), *_ = Counter(values.values()).most_common(1)
    others = {m for m, v in values.items() if v != most}
    keys = sorted(
        (m for m in values if m in others or any(end in others for end in proper_suffixes(m))), key=len, reverse=True
    )
    return most, {re.escape(m): values[m] for m in keys}


def proper_suffixes(module: str) -> list[str]:
    """Return the parts of ``module`` that start behind one of its dots, longest first, without the whole name."""
    pieces = module.split(".")
    return [".".join(pieces[i:]) for i in range(1, len(pieces))]


def dotted_pattern_value(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    """Return the value of the first key that matches the module ``name`` by the dotted rule, else ``default``.

    Raises ConfigError for a key that is no valid expression.
    """
    pattern = pattern or {}
    key = next((k for k in pattern if _compile_dotted_key(k).match(name)), name)
    return pattern.get(key, default)


def matches_dotted_pattern(key: str, name: str) -> bool:
    """Return whether a key matches the module ``name`` by the dotted rule, or is the whole name."""
    return key == name or _compile_dotted_key(key).match(name) is not None


@lru_cache(maxsize=4096)
def _compile_dotted_key(key: str) -> Pattern | re.Pattern[str]:
    return compile_pattern("n_frequency_pattern or block_size_pattern", rf".*\.{key}$", key)
