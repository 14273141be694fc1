"""Suggest the ``key_mapping`` that turns an adapter's keys into those of a program.

Under a suggested mapping every key of the adapter is a key that binds, and no two become the same. Only prefixes of
keys are exchanged, since these differ where one model is nested in another: ``model.layers`` and
``model.model.layers``. A mapping exchanges at most ``MOST`` prefixes; beyond that the adapter is another model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from adaptc.adapter_files.key_mapping import mapped, rules_of

#: prefixes that one mapping may exchange, such as a text encoder's and a denoiser's
MOST = 3
#: the number of keys of a program beyond which no mapping is searched for
SEARCHED = 100_000

#: the prefix of a key, and the prefix that replaces it
_Pair = tuple[str, str]


def mappings_for(keys: Sequence[str], sites: Iterable[str], tails: Iterable[str]) -> list[dict[str, str]]:
    """Return mappings that turn each of ``keys`` into one of ``f"{site}.{tail}"``; several where it is ambiguous.

    ``tails`` are the names of tensors at a site. At least the last component of a site's name must agree. The model
    itself, "", counts as a site.
    """
    tails = sorted(set(tails), key=len, reverse=True)
    ends: dict[str, list[list[str]]] = {}
    for site in dict.fromkeys(sites):
        ends.setdefault(site.rpartition(".")[2], []).append(site.split("."))
    modules = [".".join(parts) for same in ends.values() for parts in same]
    if len(modules) * len(tails) > SEARCHED:
        return []
    known = {f"{site}.{tail}".lstrip(".") for site in modules for tail in tails}
    left = [k for k in keys if k not in known]
    found: list[_Pair] = []
    while left:
        pairs = next((p for k in left if (p := _pairs(k, ends, tails))), {})
        if not pairs or len(found) == MOST:
            return []
        fits = {pair: {k for k in left if _exchanged(k, *pair) in known} for pair in pairs}
        if not found and (all_of := [p for p in pairs if len(fits[p]) == len(left)]):
            most = max(pairs[p] for p in all_of)
            return [m for p in all_of if pairs[p] == most and (m := _mapping([p], keys, known))]
        best = max((len(fits[pair]), same, pair) for pair, same in pairs.items())[2]
        found.append(best)
        left = [k for k in left if k not in fits[best]]
    mapping = _mapping(found, keys, known) if found else None
    return [mapping] if mapping else []


def _mapping(pairs: Sequence[_Pair], keys: Sequence[str], known: set[str]) -> dict[str, str] | None:
    """Return the pairs as a mapping of regular expressions, or None where keys that fit already would no longer fit."""
    # The first expression that matches is applied, so longer prefixes come first.
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    mapping = {f"^{re.escape(old)}": new.replace("\\", r"\\") for old, new in ordered}
    rules = rules_of(mapping)
    new = {mapped(k, rules) for k in keys}
    return mapping if len(new) == len(set(keys)) and new <= known else None


def _pairs(key: str, ends: Mapping[str, list[list[str]]], tails: Iterable[str]) -> dict[_Pair, int]:
    """Return (prefix of ``key``, its replacement) pairs, each with the number of components in which the rest agrees.

    ``ends`` maps the last component of a site to the sites that have it, as lists of components.
    """
    tail = next((t for t in tails if key.endswith(f".{t}")), None)
    if tail is None:
        return {}
    parts = key.removesuffix(f".{tail}").split(".")
    out: dict[_Pair, int] = {}
    for theirs in ends.get(parts[-1], ()):
        same = 0
        while same < min(len(parts), len(theirs)) and parts[-1 - same] == theirs[-1 - same]:
            same += 1
        old, new = parts[: len(parts) - same], theirs[: len(theirs) - same]
        if old and new and old[-1].isdecimal() and new[-1].isdecimal():
            continue  # one layer is not another name of another
        pair = _prefix(old), _prefix(new)
        out[pair] = max(same, out.get(pair, 0))
    return out


def _prefix(parts: Sequence[str]) -> str:
    return "".join(f"{p}." for p in parts)


def _exchanged(key: str, old: str, new: str) -> str | None:
    return new + key.removeprefix(old) if key.startswith(old) else None
