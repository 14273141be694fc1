"""Read from a file's description which inputs an adapter may feed, and check tensors against them.

Nothing here imports torch, since most runtimes run without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adaptc.errors import CheckpointError, SwapError, did_you_mean

#: the key of the description among what a file says of itself
METADATA_KEY = "adaptc"
#: the key in the description of a file without inputs for adapters
MERGED_KEY = "merged"
_SIZE_TEXT = re.compile(r"(?:(\d+)\*)?(\w+)")


@dataclass(frozen=True)
class AdapterInput:
    """An input that an adapter may feed.

    Attributes:
        shape: the sizes; a free size is a text, such as "rank_0" or "4*rank_0".
        dtype: the dtype, such as "float32".
        identity_shape: the shape of the value that computes the base.
        identity_value: the number that all elements of that value are; None where they are not one number.
    """

    shape: tuple[int | str, ...]
    dtype: str
    identity_shape: tuple[int, ...]
    identity_value: float | None

    def expects(self, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
        """Yield (name, size) of each free size in ``shape``; None where it is no multiple that the input may have.

        Raises ValueError where the other sizes differ.
        """
        if len(shape) != len(self.shape):
            raise ValueError(shape)
        for size, found in zip(self.shape, shape, strict=True):
            if isinstance(size, int):
                if size != found:
                    raise ValueError(shape)
                continue
            match = _SIZE_TEXT.fullmatch(size)
            times = int(match[1] or 1) if match else 1
            yield (match[2] if match else size), (None if found % times else found // times)


@dataclass(frozen=True)
class AdapterInputs:
    """The inputs of a file that an adapter may feed, by name, and the fingerprint of its base.

    ``rows`` is how a call stacks the adapters of its rows, see ``row_stacks``; None where all rows have one adapter.
    ``is_merged``: the file has no such inputs, and no fingerprint.
    """

    fingerprint: str
    by_name: Mapping[str, AdapterInput]
    rows: Any = None
    is_merged: bool = False

    @staticmethod
    def parse(text: str, path: Path) -> AdapterInputs:
        """Return what the description ``text`` of ``path`` says. Raises CheckpointError where it is damaged."""
        try:
            data: Any = json.loads(text)
            if data.get(MERGED_KEY) is True:
                return AdapterInputs("", {}, is_merged=True)
            fingerprint = data["fingerprint"]
            if not re.fullmatch("[0-9a-f]{64}", fingerprint):
                raise ValueError(f"{fingerprint!r} is no fingerprint")
            return AdapterInputs(fingerprint, {i["name"]: _parse_input(i) for i in data["inputs"]}, data.get("rows"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: the description of its adapter inputs is damaged: {error!r}") from error

    def check(
        self,
        values: Mapping[str, tuple[str, tuple[int, ...]]],
        source: str,
        ranks: tuple[int, int | None] = (0, None),
    ) -> None:
        """Raise SwapError for (dtype, shape) of tensors, by name, that are no inputs or do not fit these.

        ``ranks`` are the least and the largest free size; None for any. ``source`` names the adapter in messages.
        """
        least, most = ranks
        sizes: dict[str, tuple[int, str]] = {}
        for name, (dtype, shape) in values.items():
            if name not in self.by_name:
                raise SwapError(
                    f"{source}: the model has no input {name!r} for an adapter{did_you_mean(name, self.by_name)}"
                )
            expected = self.by_name[name]
            if dtype != expected.dtype:
                raise SwapError(f"{source}: {name!r} is {dtype}, expected {expected.dtype}")
            wrong_shape = SwapError(f"{source}: {name!r} has shape {shape}, expected {expected.shape}")
            try:
                found_sizes = list(expected.expects(shape))
            except ValueError:
                raise wrong_shape from None
            for size, found in found_sizes:
                if found is None:
                    raise wrong_shape
                if found < least:
                    raise SwapError(f"{source}: {size} is {found} in {name!r}, and the file takes {least} at least")
                if most is not None and found > most:
                    raise SwapError(
                        f"{source}: {size} is {found} in {name!r}, and the file takes {most} at most: export the "
                        "program again with a larger max_rank"
                    )
                if sizes.setdefault(size, (found, name))[0] != found:
                    first, where = sizes[size]
                    raise SwapError(f"{source}: {size} is {found} in {name!r}, and {first} in {where!r}")
        for name, expected in self.by_name.items():
            if name in values:
                continue
            for size, own in expected.expects(expected.identity_shape):
                if size in sizes and sizes[size][0] != own:
                    raise SwapError(
                        f"{source}: it has {sizes[size][1]!r}, and lacks {name!r}, which has the same {size}"
                    )


def _parse_input(data: Any) -> AdapterInput:
    identity, shape = data["identity"], data["shape"]
    if not all(isinstance(n, (int, str)) for n in shape):
        raise ValueError(f"the sizes {shape} are neither numbers nor names")
    value = identity["value"]
    found = AdapterInput(
        tuple(cast("list[int | str]", shape)),
        data["dtype"].removeprefix("torch."),
        tuple(identity["shape"]),
        None if value is None else float(value),
    )
    list(found.expects(found.identity_shape))
    return found
