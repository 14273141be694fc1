"""Write a safetensors file one tensor at a time, so that memory never holds the file.

The header has the shape and the dtype of each tensor, so these are known before the first value is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptc.adapter_files.safetensors_reader import DTYPES
from adaptc.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(NamedTuple):
    """A tensor of a file: its shape, its dtype, and the function that makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    entries: Mapping[str, TensorEntry],
    metadata: Mapping[str, str],
    written: Callable[[int], None] = lambda _: None,
) -> None:
    """Write ``entries`` to the new file ``path``, in their order. ``written`` is told the bytes of each tensor.

    Raises CheckpointError for a dtype that files cannot hold, and for a tensor that is not as its entry says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, entry in entries.items():
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{key!r} is {entry.dtype}, which safetensors files cannot hold")
        start, end = end, end + entry.nbytes
        header[key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data begin at a multiple of eight bytes
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key, entry in entries.items():
            made = entry.make().detach()
            if tuple(made.shape) != entry.shape or made.dtype != entry.dtype:
                raise CheckpointError(
                    f"{key!r} became {made.dtype} {tuple(made.shape)}, and the file has room for {entry.dtype} "
                    f"{entry.shape}: merge a program of the model instead, with adaptc.merge"
                )
            if entry.nbytes:
                file.write(made.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(entry.nbytes)
