"""Which of the checkpoints that transformers' Trainer wrote a run can go on from.

Before: the directory of a run, whose process may have been killed while it wrote. After: nothing is changed.

Trainer writes a checkpoint file by file, ``trainer_state.json`` last, and takes the newest folder for the last
checkpoint whatever is in it. So a folder whose state cannot be read is one that was never finished.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from adaptc.errors import CheckpointError
from adaptc.peft_files.directory import read_adapter
from adaptc.peft_files.snapshot import Opened

_NAME = re.compile(r"checkpoint-(\d+)")
#: what Trainer writes last
STATE = "trainer_state.json"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in the directory of a Trainer's run, for ``resume_from_checkpoint``; None where
    there is none, as ``resume_from_checkpoint`` takes it. Those that a killed process left unfinished are passed over.

    Raises CheckpointError where the directory cannot be read, or a finished checkpoint's adapter is damaged.
    """
    try:
        numbers = {int(m[1]): p for p in Path(directory).iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {directory}: {error}") from error
    for _, folder in sorted(numbers.items(), reverse=True):
        if _finished(folder):
            read_adapter(folder)
            return str(folder)
    return None


def _finished(folder: Path) -> bool:
    try:
        with Opened(folder / STATE) as file:
            return isinstance(json.loads(file.bytes()), dict)
    except (CheckpointError, OSError, ValueError, RecursionError):
        return False
