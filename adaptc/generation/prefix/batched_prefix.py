"""Compute what a fresh cache begins with where each row has an adapter of its own.

The result is one :class:`CachePrefix` for all rows. A row with fewer virtual tokens has masked empty positions before
them, so that all texts begin at one position of the cache. Its position_ids are those of a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from adaptc.bank.row_adapters import Mixes
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.spec import GenerationSpec

PrefixOf = Callable[[str, Mapping[str, Any]], CachePrefix | None]


def batched_prefix(
    mixes: Mixes, prefix_of: PrefixOf, spec: GenerationSpec, adapter_inputs: Mapping[str, Any]
) -> CachePrefix | None:
    """Return what a cache begins with for rows of these ``mixes``; None where no row has virtual tokens.

    ``prefix_of(name, given)`` returns what a cache begins with for one adapter, from the values for its rows.
    ``adapter_inputs`` has a value for each row of the batch. Raises ConfigError for a row that mixes an adapter with
    virtual tokens, and for prompts and KV prefixes in one batch. Raises AdaptcError for values that are not one for
    each row.
    """
    rows: dict[str, list[int]] = {}
    for i, mix in enumerate(mixes):
        for name in mix:
            rows.setdefault(name, []).append(i)
    prefixes: dict[str, CachePrefix] = {}
    for name, index in rows.items():
        one = prefix_of(
            name, {n: _select_rows(n, v, index, len(mixes)) for n, v in adapter_inputs.items() if v is not None}
        )
        if one is not None:
            prefixes[name] = one
            _refuse_mix(name, [mixes[i] for i in index])
    if not prefixes:
        return None
    if len({one.counts_padding for one in prefixes.values()}) > 1:
        raise ConfigError(
            f"{' and '.join(map(repr, prefixes))} put embeddings and keys in front, whose positions are counted in two "
            "ways: generate with each in a batch of its own"
        )
    return spec.cache_mode.join_prefixes(prefixes, rows, len(mixes))


def _select_rows(name: str, value: Any, index: list[int], count: int) -> Any:
    """Return the entries of ``value`` for the rows ``index``.

    Raises AdaptcError where ``value`` does not have ``count`` entries, one for each row of the batch.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return value  # the adapter refuses it with a message of its own
    if value.shape[0] != count:
        raise AdaptcError(f"{name} has {value.shape[0]} entries, and adapters has {count}: give one for each row")
    return value[index]


def _refuse_mix(name: str, mixes: list[Mapping[str, float]]) -> None:
    for mix in mixes:
        if mix != {name: 1.0}:
            raise ConfigError(
                f"a row has the mix {dict(mix)}, and {name!r} puts tokens in front, which are there or are not: give "
                f"the row {name!r} alone"
            )
