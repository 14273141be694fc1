"""Read and write files of statistics in PEFT's formats: dicts of tensors by module, written by ``torch.save``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.adapter_files.safe_load import load_pickle, save_tensors, to_dense
from adaptc.adapter_files.stable_read import OpenedFile
from adaptc.errors import CheckpointError

#: the prefix of names of modules in a model of PEFT
PEFT_PREFIX = "base_model.model."


def has_statistics(path: str | os.PathLike[str] | None) -> bool:
    """Return whether there is a file that is not empty at ``path``."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def read_statistics(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int | None]]) -> dict[str, Tensor]:
    """Return the tensors of the keys in ``shapes``, of these shapes; None stands for any size.

    Keys may begin with PEFT's prefix, and others are left out. Raises CheckpointError for a key that is missing, a
    tensor of another shape, and one that is not finite.
    """
    file = OpenedFile(Path(path))
    with file:
        found = {k.removeprefix(PEFT_PREFIX): t for k, t in load_pickle(file).items()}
    for key, shape in shapes.items():
        if key not in found:
            raise CheckpointError(f"{os.fspath(path)!r} has no {key!r}: it was written for other layers than these")
        have = tuple(found[key].shape)
        if len(have) != len(shape) or any(want not in (None, n) for n, want in zip(have, shape, strict=True)):
            raise CheckpointError(
                f"{os.fspath(path)!r}: {key!r} has shape {have}, expected {tuple(shape)}: it was written for another "
                "model or rank. Name another file to make it anew"
            )
        if not bool(found[key].isfinite().all()):
            raise CheckpointError(f"{os.fspath(path)!r}: {key!r} has NaN or infinite values")
    return {key: found[key] for key in shapes}


def write_statistics(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors as PEFT does, whole or not at all. Missing directories are made."""
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(Path(path)) as new:
        save_tensors(to_dense(tensors), new, safe_serialization=False)
