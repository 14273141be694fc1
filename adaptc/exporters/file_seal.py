"""Seal files with a hash of their bytes, so that a runtime is never given a damaged one.

Runtimes read weights unchecked, and some end the process on a forged file. A seal is one line at the end of a file. In
XML it is a comment, and loaders of flatbuffers read nothing behind what their headers name. It is no signature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from adaptc.errors import CheckpointError

_SEAL = re.compile(rb"<!-- adaptc sha256 ([0-9a-f]{64}) -->\n")
_LENGTH = len("<!-- adaptc sha256  -->\n") + 64
_CHUNK = 1 << 20


def add_seal(path: Path, others: Sequence[Path] = ()) -> None:
    """Add to ``path`` a hash of its bytes and of those of the files ``others``. Raises OSError."""
    digest = _hash(path, path.stat().st_size, others)
    with path.open("ab") as file:
        file.write(f"<!-- adaptc sha256 {digest} -->\n".encode())


def check_seal(path: Path, others: Sequence[Path] = (), optional: Sequence[Path] = (), *, writer: str) -> None:
    """Raise CheckpointError where ``path`` has no seal, or one of other bytes. ``writer`` names what writes such files.

    The files ``others`` are those that were sealed with it, and of ``optional`` those that are there.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        size = path.stat().st_size - _LENGTH
        with path.open("rb") as file:
            file.seek(max(size, 0))
            match = _SEAL.fullmatch(file.read())
        if match is None:
            raise CheckpointError(f"{path} was not written by {writer}, or was changed afterwards: write it again")
        if missing := [p for p in others if not p.is_file()]:
            raise CheckpointError(f"there is no file {missing[0]}, which belongs to {path.name}")
        absent = [p for p in optional if not p.is_file()]
        others = [*others, *(p for p in optional if p not in absent)]
        if match[1].decode() != _hash(path, size, others):
            if absent:
                raise CheckpointError(
                    f"there is no file {absent[0]}, which belongs to {path.name}, or {path.name} was changed after "
                    f"{writer} wrote it: write it again"
                )
            names = " or ".join(p.name for p in (path, *others))
            raise CheckpointError(f"{path} is damaged: {names} was changed after {writer} wrote it: write it again")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _hash(path: Path, size: int, others: Sequence[Path]) -> str:
    hashed = hashlib.sha256()
    for file_path, count in [(path, size), *((p, p.stat().st_size) for p in others)]:
        hashed.update(f"{count}\n".encode())
        with file_path.open("rb") as file:
            while count > 0 and (data := file.read(min(count, _CHUNK))):
                hashed.update(data)
                count -= len(data)
    return hashed.hexdigest()
