"""Compute what a fresh cache begins with where each row has an adapter of its own.

The result is one :class:`CachePrefix` for all rows. A row with fewer virtual tokens has masked empty positions before
them, so that all texts begin at one position of the cache. Its position_ids are those of a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptc.bank.row_adapters import Mixes
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.spec import STATE, GenerationSpec

Opened = Callable[[str, Mapping[str, Any]], CachePrefix | None]


def front_of_rows(mixes: Mixes, opened: Opened, facts: GenerationSpec, given: Mapping[str, Any]) -> CachePrefix | None:
    """Return what a cache begins with for rows of these ``mixes``; None where no row has virtual tokens.

    ``opened(name, given)`` returns what a cache begins with for one adapter, from the values for its rows. ``given``
    has a value for each row of the batch. Raises ConfigError for a row that mixes an adapter with virtual tokens, and
    for prompts and KV prefixes in one batch. Raises AdaptcError for values that are not one for each row.
    """
    rows: dict[str, list[int]] = {}
    for i, mix in enumerate(mixes):
        for name in mix:
            rows.setdefault(name, []).append(i)
    found: dict[str, CachePrefix] = {}
    for name, index in rows.items():
        one = opened(name, {n: _of(n, v, index, len(mixes)) for n, v in given.items() if v is not None})
        if one is not None:
            found[name] = one
            _check_alone(name, [mixes[i] for i in index])
    if not found:
        return None
    if len({one.in_places for one in found.values()}) > 1:
        raise ConfigError(
            f"{' and '.join(map(repr, found))} put embeddings and keys in front, whose positions are counted in two "
            "ways: generate with each in a batch of its own"
        )
    return _joined(found, rows, len(mixes), facts)


def _of(name: str, value: Any, index: list[int], count: int) -> Any:
    """Return the entries of ``value`` for the rows ``index``.

    Raises AdaptcError where ``value`` does not have ``count`` entries, one for each row of the batch.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return value  # the adapter refuses it with a message of its own
    if value.shape[0] != count:
        raise AdaptcError(f"{name} has {value.shape[0]} entries, and adapters has {count}: give one for each row")
    return value[index]


def _check_alone(name: str, mixes: list[Mapping[str, float]]) -> None:
    for mix in mixes:
        if mix != {name: 1.0}:
            raise ConfigError(
                f"a row has the mix {dict(mix)}, and {name!r} puts tokens in front, which are there or are not: give "
                f"the row {name!r} alone"
            )


def _joined(
    found: Mapping[str, CachePrefix], rows: Mapping[str, list[int]], count: int, facts: GenerationSpec
) -> CachePrefix:
    longest, first = max(one.count for one in found.values()), next(iter(found.values()))
    ahead = torch.full((count,), longest, device=first.tensors[0].device)
    out: list[Tensor] = []
    for like in first.tensors:
        sizes = like.shape[1:] if facts.keeps == STATE else (like.shape[1], longest, like.shape[3])
        out.append(like.new_zeros(count, *sizes))
    for name, one in found.items():
        index = torch.tensor(rows[name], device=ahead.device)
        empty = longest - one.count
        ahead[index] = empty
        for made, own in zip(out, one.tensors, strict=True):
            wide = own.expand(len(index), *own.shape[1:])
            made[index] = wide if facts.keeps == STATE else pad(wide, (0, 0, empty, 0))
    return CachePrefix(out, longest, first.in_places, ahead)
