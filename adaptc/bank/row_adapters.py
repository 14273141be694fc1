"""Turn what callers say of the rows of a batch (no adapter, one, or a weighted mix) into a selection.

Callers give one entry per row. It becomes a mix: the row's adapters with their weights, which are finite numbers. Names
are checked against those of the bank, and weights of zero are dropped. A :class:`RowSelection` has the mixes with the
adapters that they name. Code reads them as coefficients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, did_you_mean, listing, short_repr
from adaptc.state.runner import AdapterSelection
from adaptc.torch_typing import is_list_or_tuple, is_mapping, to_python
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
    return tuple(_parse_mix(i, one) for i, one in enumerate(cast("Sequence[Any]", adapters)))


def parse_prompt_adapters(adapters: Any, prompts: Any) -> Mixes:
    """Return the mixes of ``adapters``, which has an entry for each of ``prompts`` (batch, ...), as
    :func:`parse_row_adapters` does.

    Raises AdaptcError where there are not as many entries as prompts.
    """
    mixes = parse_row_adapters(adapters)
    if isinstance(prompts, Tensor) and prompts.ndim and prompts.shape[0] != len(mixes):
        raise AdaptcError(
            f"adapters has {len(mixes)} entries, and there are {prompts.shape[0]} prompts: give one for each, None for "
            "the base"
        )
    return mixes


def parse_segments(cu_seq_lens: Any, count: int) -> tuple[int, ...] | None:
    """Return the number of rows of each of ``count`` entries of adapters, from where they begin and end; None for None.

    ``cu_seq_lens`` (count + 1,) are whole numbers from 0 upwards, as attention for packed texts takes them. Raises
    AdaptcError for anything else.
    """
    if cu_seq_lens is None:
        return None
    ends = to_python(cu_seq_lens) if isinstance(cu_seq_lens, Tensor) else cu_seq_lens
    if (
        not is_list_or_tuple(ends)
        or len(ends) != count + 1
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in ends)
        or ends[0] != 0
        or any(a > b for a, b in pairwise(ends))
    ):
        raise AdaptcError(
            f"cu_seq_lens={short_repr(ends)} must be {count + 1} whole numbers from 0 upwards, where each of the "
            f"{count} entries of adapters begins and where the last one ends"
        )
    return tuple(b - a for a, b in pairwise(ends))


def _parse_mix(row: int, entry: Any) -> dict[str, float]:
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not is_mapping(entry):
        raise AdaptcError(
            f"adapters[{row}] is {short_repr(entry)}: expected a name, None for the base, or a dict of names and "
            "weights"
        )
    out: dict[str, float] = {}
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
    return not isinstance(weight, bool) and isinstance(weight, Real) and is_finite_in_float32(weight)


def adapter_names_in(mixes: Mixes) -> tuple[str, ...]:
    """Return the names in ``mixes``, in the order in which they come first."""
    return tuple(dict.fromkeys(name for mix in mixes for name in mix))


def check_adapter_names(names: Collection[str], available: Collection[str]) -> None:
    """Raise AdaptcError for a name that is not among the ``available``."""
    given: Collection[Any] = names  # callers may give anything
    for name in given:
        if not isinstance(name, str):
            raise AdaptcError(f"the name of an adapter is a string, not {short_repr(name)}")
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


@dataclass(frozen=True, eq=False)
class RowSelection(AdapterSelection):
    """The adapters of each row of a batch.

    ``mixes``: the mix of each row. ``adapters``: name -> the binding of each adapter in them. ``repeats``: a batch may
    have each row several times in succession, as the beams of a prompt are; else it has each row once. ``lengths``: how
    many rows each mix is of, where rows are tokens and a mix is of a text; None for one each.
    """

    mixes: Mixes
    adapters: Mapping[str, Binding]
    repeats: bool = True
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of_mixes(
        cls,
        mixes: Mixes,
        adapters: Mapping[str, Binding],
        repeats: bool = True,
        lengths: tuple[int, ...] | None = None,
    ) -> RowSelection:
        """Return the selection of these mixes; its binding tells the names of its adapters alone."""
        names = ", ".join(map(str, adapter_names_in(mixes))) or "the base"
        return cls(replace(Binding.empty(), source=names), mixes, adapters, repeats, lengths)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the adapters, in the order in which rows name them first."""
        return adapter_names_in(self.mixes)

    @property
    def row_count(self) -> int:
        """Return the number of rows of a batch that has each row once."""
        return len(self.mixes) if self.lengths is None else sum(self.lengths)

    @property
    def has_adapter(self) -> bool:
        return any(self.mixes)

    @property
    def single_adapter(self) -> str | None:
        """Return the name of the adapter that all rows use alone, with weight 1; None where there is no such one."""
        names = self.names
        return names[0] if names and all(mix == {names[0]: 1.0} for mix in self.mixes) else None

    def coefficients(self, rows: int, names: Sequence[str], count: int, device: torch.device) -> Tensor:
        """Return the coefficients of a batch of so many rows, as :func:`make_coefficients` lays them out.

        Raises AdaptcError where ``rows`` is not a multiple of the number of mixes.
        """
        if self.lengths is not None:
            if sum(self.lengths) != rows:
                raise AdaptcError(f"the lengths of the texts add up to {sum(self.lengths)}, and the batch has {rows}")
            each_text = make_coefficients(self.mixes, names, count, device)
            return each_text.repeat_interleave(torch.tensor(self.lengths, device=device), 0, output_size=rows)
        each, rest = divmod(rows, len(self.mixes)) if self.mixes else (0, rows)
        if rest:
            raise AdaptcError(f"adapters has {len(self.mixes)} entries, and the batch has {rows} rows")
        return make_coefficients(tuple(m for m in self.mixes for _ in range(each)), names, count, device)

    def check_encoder_rows(self, rows: int) -> None:
        """Raise AdaptcError where a call encodes another number of rows than the selection has: nothing tells which
        rows they are."""
        if rows != len(self.mixes):
            raise AdaptcError(
                f"adapters has {len(self.mixes)} entries, and {rows} rows are encoded: give one entry for each row. "
                "Where a generation goes on with some of its rows alone, or has them several times (recordings that "
                "are cut, timestamps, several temperatures or answers), run those of each adapter by themselves"
            )
