"""The ``key_mapping`` with which an adapter's keys would be those of a program.

Before: keys of an adapter, of which some bind to nothing, and the keys that would bind. After: mappings under which
every key of the adapter is one of the latter and no two are the same, or nothing. Only what keys begin with is
exchanged, as it differs where one model lies in another: ``model.layers`` and ``model.model.layers``. At most ``MOST``
such beginnings are: beyond that the adapter is another model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from adaptc.peft_files.key_mapping import mapped, rules_of

#: beginnings that one mapping may exchange (a text encoder's and a denoiser's, say)
MOST = 3
#: keys of the program that those of the adapter are compared with
SEARCHED = 100_000

_Pair = tuple[str, str]
"""What keys begin with, and what takes its place."""


def mappings_for(keys: Sequence[str], sites: Iterable[str], tails: Iterable[str]) -> list[dict[str, str]]:
    """Mappings that make each of ``keys`` one of ``f"{site}.{tail}"``; several where these do not tell which is meant.

    ``tails``: what tensors are called at a site. Of a site's name, the last component must agree at least; the model
    itself, "", is a site that follows the others.
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
    """The pairs as expressions, if they do what they should to keys that fit already, too."""
    # The first expression that matches rules, so what is longer comes first.
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    mapping = {f"^{re.escape(old)}": new.replace("\\", r"\\") for old, new in ordered}
    rules = rules_of(mapping)
    new = {mapped(k, rules) for k in keys}
    return mapping if len(new) == len(set(keys)) and new <= known else None


def _pairs(key: str, ends: Mapping[str, list[list[str]]], tails: Iterable[str]) -> dict[_Pair, int]:
    """What may take the place of what ``key`` begins with, and in how many components the rest of the site agrees.

    ``ends``: last component of a site -> the sites that have it, in components.
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
