"""Suggest the ``key_mapping`` that turns an adapter's keys into those of a program.

Under a suggested mapping every key of the adapter is a key that binds, and no two become the same. Only prefixes of
keys are exchanged, since these differ where one model is nested in another: ``model.layers`` and
``model.model.layers``. A mapping exchanges at most ``MAX_PREFIXES`` prefixes; beyond that the adapter is another
model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from adaptc.adapter_files.key_mapping import compile_rules, rename_key

#: prefixes that one mapping may exchange, such as a text encoder's and a denoiser's
MAX_PREFIXES = 3
#: the number of keys of a program beyond which no mapping is searched for
MAX_SEARCHED_KEYS = 100_000

#: the prefix of a key, and the prefix that replaces it
_PrefixPair = tuple[str, str]


def suggest_mappings(keys: Sequence[str], sites: Iterable[str], slot_names: Iterable[str]) -> list[dict[str, str]]:
    """Return mappings that turn each of ``keys`` into one of ``f"{site}.{tail}"``; several where it is ambiguous.

    ``slot_names`` are the names of tensors at a site. At least the last component of a site's name must agree. The
    model itself, "", counts as a site.
    """
    slot_names = sorted(set(slot_names), key=len, reverse=True)
    sites_by_end: dict[str, list[list[str]]] = {}
    for site in dict.fromkeys(sites):
        sites_by_end.setdefault(site.rpartition(".")[2], []).append(site.split("."))
    modules = [".".join(parts) for same in sites_by_end.values() for parts in same]
    if len(modules) * len(slot_names) > MAX_SEARCHED_KEYS:
        return []
    program_keys = {f"{site}.{tail}".lstrip(".") for site in modules for tail in slot_names}
    remaining = [k for k in keys if k not in program_keys]
    chosen: list[_PrefixPair] = []
    while remaining:
        found = (_prefix_pairs(k, sites_by_end, slot_names) for k in remaining)
        pairs = next(filter(None, found), dict[_PrefixPair, int]())
        if not pairs or len(chosen) == MAX_PREFIXES:
            return []
        fits = {pair: {k for k in remaining if _exchange_prefix(k, *pair) in program_keys} for pair in pairs}
        if not chosen and (all_of := [p for p in pairs if len(fits[p]) == len(remaining)]):
            most = max(pairs[p] for p in all_of)
            return [m for p in all_of if pairs[p] == most and (m := _mapping_of_pairs([p], keys, program_keys))]
        best = max((len(fits[pair]), same, pair) for pair, same in pairs.items())[2]
        chosen.append(best)
        remaining = [k for k in remaining if k not in fits[best]]
    mapping = _mapping_of_pairs(chosen, keys, program_keys) if chosen else None
    return [mapping] if mapping else []


def _mapping_of_pairs(
    pairs: Sequence[_PrefixPair], keys: Sequence[str], program_keys: set[str]
) -> dict[str, str] | None:
    """Return the pairs as a mapping of regular expressions, or None where keys that fit already would no longer fit."""
    # The first expression that matches is applied, so longer prefixes come first.
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    mapping = {f"^{re.escape(old)}": new.replace("\\", r"\\") for old, new in ordered}
    rules = compile_rules(mapping)
    new = {rename_key(k, rules) for k in keys}
    return mapping if len(new) == len(set(keys)) and new <= program_keys else None


def _prefix_pairs(
    key: str, sites_by_end: Mapping[str, list[list[str]]], slot_names: Iterable[str]
) -> dict[_PrefixPair, int]:
    """Return (prefix of ``key``, its replacement) pairs, each with the number of components in which the rest agrees.

    ``sites_by_end`` maps the last component of a site to the sites that have it, as lists of components.
    """
    tail = next((t for t in slot_names if key.endswith(f".{t}")), None)
    if tail is None:
        return {}
    parts = key.removesuffix(f".{tail}").split(".")
    out: dict[_PrefixPair, int] = {}
    for theirs in sites_by_end.get(parts[-1], ()):
        same = 0
        while same < min(len(parts), len(theirs)) and parts[-1 - same] == theirs[-1 - same]:
            same += 1
        old, new = parts[: len(parts) - same], theirs[: len(theirs) - same]
        if old and new and old[-1].isdecimal() and new[-1].isdecimal():
            continue  # one layer is not another name of another
        pair = _join_prefix(old), _join_prefix(new)
        out[pair] = max(same, out.get(pair, 0))
    return out


def _join_prefix(path: Sequence[str]) -> str:
    return "".join(f"{p}." for p in path)


def _exchange_prefix(key: str, old: str, new: str) -> str | None:
    return new + key.removeprefix(old) if key.startswith(old) else None
