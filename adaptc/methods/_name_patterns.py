"""Options by module: PEFT's two rules for tables whose keys are regular expressions for names.

``rank_pattern`` and its like: a key is an expression for the end of a name, starting at a dot or at the front.
``n_frequency_pattern`` of FourierFT and ``block_size_pattern`` of C3A (``dotted_*``): a key is an expression for what
follows a dot, an alternation in it is not kept together, and the whole name counts only where no expression matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from adaptc.errors import SHOWN, Tell, and_more, did_you_mean, refuse_entry
from adaptc.patterns import Pattern, compiled

T = TypeVar("T")
V = TypeVar("V")

#: keys of a table that are tried one by one; and the most there may be, which no model has modules for
FEW, MANY = 64, 100_000

_PLAIN = re.compile(r"(?:[\w.]|\\\.)+")


def pattern_value(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value ``rank_pattern`` or ``alpha_pattern`` gives the module ``name``: the first key that matches wins.

    A key is a regular expression for the end of the name, starting at a dot or at the front. Raises
    :class:`ConfigError` when it is not a valid one.
    """
    if not pattern:
        return default
    keys = pattern if len(pattern) < FEW else _likely(tuple(pattern), name)
    return next((pattern[key] for key in keys if matches_pattern(key, name)), default)


@lru_cache(maxsize=8)
def _by_ending(keys: tuple[str, ...]) -> Mapping[str, Sequence[int]]:
    """The places of the keys, by the literal ending a name must have for them."""
    out: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        out.setdefault(_ending(key), []).append(i)
    return out


def _likely(keys: tuple[str, ...], name: str) -> list[str]:
    """Those of many keys that may be for ``name``, in order: one table for all the layers of a model has thousands."""
    places = _by_ending(keys)
    return [keys[i] for i in sorted(i for start in range(len(name) + 1) for i in places.get(name[start:], ()))]


def unused_patterns(
    pattern: Mapping[str, object] | None, names: Iterable[str], matches: Callable[[str, str], bool] | None = None
) -> list[str]:
    """The keys of ``rank_pattern`` or ``alpha_pattern`` that match none of ``names``, in order."""
    names = list(names)
    if matches is not None or len(pattern or {}) < FEW:
        return [key for key in pattern or {} if not any((matches or matches_pattern)(key, n) for n in names)]
    keys = tuple(pattern or {})
    left = dict.fromkeys(keys)
    for name in names:
        for key in _likely(keys, name):
            if key in left and matches_pattern(key, name):
                del left[key]
    return list(left)


def check_patterns(
    option: str,
    pattern: Mapping[str, object] | None,
    names: Sequence[str],
    matches: Callable[[str, str], bool] | None = None,
    tell: Tell = refuse_entry,
) -> None:
    """Tells when a key of ``pattern`` (the option named ``option``) matches no adapted module; by default, raises
    :class:`TargetError`.

    ``matches(key, name)`` is the rule of the option, where it has one of its own.
    """
    unused = unused_patterns(pattern, names, matches)
    if unused:
        hints = [f"{key!r} matches no adapted module{did_you_mean(key, names)}" for key in unused[:SHOWN]]
        tell(f"{option}: " + "; ".join(hints) + and_more(unused))


def value_table(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent value, and PEFT's table of the others, by names of modules. Its first key that matches the end
    of a name rules, so longer names come first, and one that ends as another's is there even with the frequent
    value."""
    (most, _), *_ = Counter(values.values()).most_common(1)
    others = {m for m, v in values.items() if v != most}
    keys = sorted((m for m in values if m in others or any(end in others for end in endings(m))), key=len, reverse=True)
    return most, {re.escape(m): values[m] for m in keys}


def endings(module: str) -> list[str]:
    """What the name of a module ends with, from dot to dot, without the whole of it."""
    pieces = module.split(".")
    return [".".join(pieces[i:]) for i in range(1, len(pieces))]


def _ending(key: str) -> str:
    return key.rpartition(".")[2] if _PLAIN.fullmatch(key) else ""


@lru_cache(maxsize=65536)
def _pattern_rule(key: str) -> tuple[str, Pattern | re.Pattern[str]]:
    """The regular expression of a key, and a literal ending that rules out most names before it is tried."""
    return _ending(key), compiled("rank_pattern or alpha_pattern", rf"(.*\.)?({key})$", key)


def matches_pattern(key: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is for the module ``name``."""
    ending, regex = _pattern_rule(key)
    return name.endswith(ending) and regex.match(name) is not None


def dotted_value(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value of the first key that matches the module ``name``. Raises ConfigError for a bad expression."""
    pattern = pattern or {}
    key = next((k for k in pattern if _rule(k).match(name)), name)
    return pattern.get(key, default)


def dotted_match(key: str, name: str) -> bool:
    """Whether a key of such a table is for the module ``name``."""
    return key == name or _rule(key).match(name) is not None


@lru_cache(maxsize=4096)
def _rule(key: str) -> Pattern | re.Pattern[str]:
    return compiled("n_frequency_pattern or block_size_pattern", rf".*\.{key}$", key)
