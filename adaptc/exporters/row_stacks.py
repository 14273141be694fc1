"""Stack adapters for a call of a file in which each row has adapters of its own.

A file says in its description how: the input of the coefficients, where the rows are, and how each tensor of an adapter
is padded to a larger rank (``row_program`` writes it). The stacks of the last selections are kept, so calls that name
the same adapters feed the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.archives.json_schema import DictOf, Nullable, Size, check_json
from adaptc.archives.refusal import UnsafeFile
from adaptc.bank.row_adapters import adapter_names_in, make_coefficients, parse_row_adapters
from adaptc.errors import CheckpointError, ConfigError, SwapError
from adaptc.exporters.adapter_feeds import AdapterInput, AdapterInputs
from adaptc.runtime.rank_padding import Padding

#: the form of the field ``rows`` of a description
ROWS_SCHEMA: dict[str, Any] = {
    "coefficients": str,
    "batch": {"input": str, "axis": Size},
    "capacity": Nullable(Size),
    "max_rank": Nullable(Size),
    "paddings": DictOf(Nullable({"blocks": Size, "fill": (int, float)})),
    "scalars": [str],
}
#: how many stacks are kept
MAX_STACKS = 2

#: the tensors of an adapter by the names of the inputs, as arrays
Arrays = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowFeeds:
    """The inputs of a call: the stacked tensors by name, and the coefficients (rows, adapters)."""

    values: Mapping[str, Any]
    coefficients: Any


class RowStacks:
    """The stacks of one file's adapters.

    Args:
        data: the field ``rows`` of the file's description.
        inputs: the inputs of the file, for one adapter.
        path: the file, for messages.

    Raises:
        CheckpointError: the description is damaged.
    """

    def __init__(self, data: Any, inputs: AdapterInputs, path: Path) -> None:
        try:
            check_json(data, ROWS_SCHEMA)
            if data["paddings"].keys() != inputs.by_name.keys() or not set(data["scalars"]) <= inputs.by_name.keys():
                raise UnsafeFile("the inputs of rows are not those of adapters")
        except UnsafeFile as error:
            raise CheckpointError(f"{path}: the description of its rows is damaged: {error}") from error
        self._inputs, self._path = inputs, path
        self.coefficients: str = data["coefficients"]
        self.batch: tuple[str, int] = data["batch"]["input"], data["batch"]["axis"]
        self.capacity: int | None = data["capacity"]
        self.max_rank: int | None = data["max_rank"]
        self._paddings = {n: None if p is None else Padding(**p) for n, p in data["paddings"].items()}
        self._scalars = frozenset[str](data["scalars"])
        #: (adapters by name, their stack), most recently used last
        self._kept: tuple[tuple[Mapping[str, Arrays], Mapping[str, Any]], ...] = ()

    def check_complete(self, values: Arrays, source: str) -> None:
        """Raise SwapError for an adapter that lacks an input whose value for the base is not in the description."""
        for name, one in self._inputs.by_name.items():
            if name not in values and one.identity_value is None:
                raise SwapError(
                    f"{source}: it lacks {name!r}, and {self._path} does not say what the base has there: give a "
                    "PEFT directory, or a file that adaptc wrote for this model"
                )

    def feeds(
        self,
        entries: Any,
        adapter_of: Callable[[str], Arrays],
        as_value: Callable[[Any], Any],
        rows: int | None = None,
    ) -> RowFeeds:
        """Return what a call is fed whose rows have the ``entries``, as calls of a bank take them.

        ``adapter_of`` gives the adapter of a name. ``as_value`` makes a value of the runtime of an array. ``rows`` is
        the number of rows; None for that of the entries.

        Raises AdaptcError for what is no list of entries, and ConfigError for another number of rows and for adapters
        that cannot share a call.
        """
        mixes = parse_row_adapters(entries)
        if rows is not None and len(mixes) != rows:
            raise ConfigError(
                f"adapters has {len(mixes)} entries, and {self.batch[0]!r} has {rows} rows: give one for each row, "
                "None for the base"
            )
        names = adapter_names_in(mixes)
        if self.capacity is not None and len(names) > self.capacity:
            raise ConfigError(f"the call names {len(names)} adapters, and {self._path} takes {self.capacity} at once")
        chosen = {n: adapter_of(n) for n in names}
        values: Mapping[str, Any] = self._stack(chosen, as_value) if chosen else {}
        count = self.capacity or max(len(names), 1)
        return RowFeeds(values, make_coefficients(mixes, names, count, torch.device("cpu")).numpy())

    def _stack(self, chosen: Mapping[str, Arrays], as_value: Callable[[Any], Any]) -> Mapping[str, Any]:
        for kept, values in reversed(self._kept):
            if list(kept) == list(chosen) and all(kept[n] is a for n, a in chosen.items()):
                return values
        filled = [*chosen.values()]
        filled += filled[:1] * ((self.capacity or 0) - len(filled))
        values = {n: as_value(self._stack_input(n, one, filled)) for n, one in self._inputs.by_name.items()}
        self._kept = (*self._kept, (dict(chosen), values))[-MAX_STACKS:]
        return values

    def _stack_input(self, name: str, one: AdapterInput, adapters: Sequence[Arrays]) -> Any:
        tensors = [_tensor(a[name]) if name in a else _identity(one) for a in adapters]
        if name in self._scalars:
            return torch.cat(tensors).numpy()
        shape = tuple(max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True))
        return torch.stack([self._pad(name, t, shape) for t in tensors]).numpy()

    def _pad(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        padding = self._paddings[name]
        if tuple(tensor.shape) == shape:
            return tensor
        try:
            if padding is None:
                raise ValueError("it cannot be filled up")
            return padding(tensor, shape)
        except ValueError as error:
            raise ConfigError(
                f"{name!r} has shape {tuple(tensor.shape)} in one adapter and {shape} in the largest, and the two "
                f"cannot share a call ({error}): run them in calls of their own"
            ) from error


def _identity(one: AdapterInput) -> Tensor:
    return _tensor(np.full(one.identity_shape, one.identity_value, one.dtype))


def _tensor(array: Any) -> Tensor:
    untyped: Any = torch
    return untyped.from_numpy(array)
