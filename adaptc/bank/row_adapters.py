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

from adaptc.errors import AdaptcError, did_you_mean, listing, shown
from adaptc.value_types import finite_in_float32

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
            f"adapters={shown(adapters)} is no list: give one entry for each row of the batch, a name, None for the "
            'base, or a mix such as {"fr": 0.7, "style": 0.3}'
        )
    return tuple(_mix(i, one) for i, one in enumerate(adapters))


def _mix(row: int, one: Any) -> dict[str, float]:
    if one is None:
        return {}
    if isinstance(one, str):
        return {one: 1.0}
    if not isinstance(one, Mapping):
        raise AdaptcError(
            f"adapters[{row}] is {shown(one)}: expected a name, None for the base, or a dict of names and weights"
        )
    out = {}
    for name, weight in one.items():
        if not isinstance(name, str) or not _is_number(weight):
            raise AdaptcError(
                f"adapters[{row}] gives {shown(name)} the weight {shown(weight)}: names are strings and weights "
                "numbers, finite in float32"
            )
        if weight:
            out[name] = float(weight)
    return out


def _is_number(weight: Any) -> bool:
    return isinstance(weight, Real) and not isinstance(weight, bool) and finite_in_float32(weight)


def used(mixes: Mixes) -> tuple[str, ...]:
    """Return the names in ``mixes``, in the order in which they come first."""
    return tuple(dict.fromkeys(name for mix in mixes for name in mix))


def check_known(names: Collection[str], known: Collection[str]) -> None:
    """Raise AdaptcError for a name that is not among the ``known``."""
    for name in names:
        if name not in known:
            raise AdaptcError(
                f"the bank has no adapter {shown(name)}; it has {listing(map(repr, known)) or 'none'}"
                f"{did_you_mean(name, known)}. Add it first: bank.add({shown(name)}, adapter)"
            )


def coefficients(mixes: Mixes, names: Sequence[str], count: int, device: torch.device) -> Tensor:
    """Return the coefficients of a call, float32 (rows, count): for each row the weight of the adapter at each place.

    ``names`` are the adapters at the first places. All other coefficients are zero.
    """
    at = {name: i for i, name in enumerate(names)}
    out = torch.zeros(len(mixes), count)
    for row, mix in enumerate(mixes):
        for name, weight in mix.items():
            out[row, at[name]] = weight
    return out.to(device)
