"""Read texts that were saved beside a program in its file, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptc.errors import CheckpointError
from adaptc.pt2_files.archive import opened
from adaptc.pt2_files.refusal import UnsafeFile, reason, shown_path

#: the most bytes of a text that are read
_MOST = 16 << 20


def read_beside(path: Path, name: str) -> Any:
    """Return the JSON value in the text ``name`` of a program's file, or None where the file has no such text.

    Raises CheckpointError where it cannot be read.
    """
    try:
        with opened(path) as archive:
            record = next((r for r in (f"extra/{name}", f"data/extra/{name}") if r in archive.records), None)
            return None if record is None else json.loads(archive.read(record, _MOST))
    except (UnsafeFile, ValueError, OSError, RecursionError) as error:
        why = str(error) if isinstance(error, UnsafeFile) else reason(error)
        raise CheckpointError(f"{shown_path(path)}: {name} cannot be read: {why}. Save the program again") from error
