"""Turn what callers say of the rows of a batch (no adapter, one, or a weighted mix) into coefficients.

Callers give one entry per row. It becomes a mix: the row's adapters with their weights, which are finite numbers. Names
are checked against those of the bank, and weights of zero are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, did_you_mean, listing, short_repr
from adaptc.value_types import is_finite_in_float32

#: for each row the weights of its adapters, by name
Mixes = tuple[Mapping[str, float], ...]


def parse_row_adapters(adapters: Any) -> Mixes:
    """Return the mixes of ``adapters`` as callers write it: a list with, for each row, None, a name, or a dict of names
    and weights.

    Raises AdaptcError for anything else, also where it was left out (``...``).
    """
    if adapters is ...:
        raise AdaptcError(
            "adapters= is missing: give one entry for each row of the batch, a name, None for the base, or a mix such "
            'as {"fr": 0.7, "style": 0.3}'
        )
    if isinstance(adapters, (str, Mapping, Tensor)) or not isinstance(adapters, Sequence):
        raise AdaptcError(
            f"adapters={short_repr(adapters)} is no list: give one entry for each row of the batch, a name, None for "
            'the base, or a mix such as {"fr": 0.7, "style": 0.3}'
        )
    return tuple(_parse_mix(i, one) for i, one in enumerate(adapters))


def _parse_mix(row: int, entry: Any) -> dict[str, float]:
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise AdaptcError(
            f"adapters[{row}] is {short_repr(entry)}: expected a name, None for the base, or a dict of names and "
            "weights"
        )
    out = {}
    for name, weight in entry.items():
        if not isinstance(name, str) or not _is_number(weight):
            raise AdaptcError(
                f"adapters[{row}] gives {short_repr(name)} the weight {short_repr(weight)}: names are strings and "
                "weights numbers, finite in float32"
            )
        if weight:
            out[name] = float(weight)
    return out


def _is_number(weight: Any) -> bool:
    return isinstance(weight, Real) and not isinstance(weight, bool) and is_finite_in_float32(weight)


def adapter_names_in(mixes: Mixes) -> tuple[str, ...]:
    """Return the names in ``mixes``, in the order in which they come first."""
    return tuple(dict.fromkeys(name for mix in mixes for name in mix))


def check_adapter_names(names: Collection[str], available: Collection[str]) -> None:
    """Raise AdaptcError for a name that is not among the ``available``."""
    for name in names:
        if name not in available:
            raise AdaptcError(
                f"the bank has no adapter {short_repr(name)}; it has {listing(map(repr, available)) or 'none'}"
                f"{did_you_mean(name, available)}. Add it first: bank.add({short_repr(name)}, adapter)"
            )


def make_coefficients(mixes: Mixes, names: Sequence[str], count: int, device: torch.device) -> Tensor:
    """Return the coefficients of a call, float32 (rows, count): for each row the weight of the adapter at each place.

    ``names`` are the adapters at the first places. All other coefficients are zero.
    """
    at = {name: i for i, name in enumerate(names)}
    out = torch.zeros(len(mixes), count)
    for row, mix in enumerate(mixes):
        for name, weight in mix.items():
            out[row, at[name]] = weight
    return out.to(device)
