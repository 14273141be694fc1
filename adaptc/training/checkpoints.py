"""Find the checkpoint of transformers' Trainer that a run can resume from.

The process of the run may have been killed while it wrote. Trainer writes a checkpoint file by file,
``trainer_state.json`` last, and takes the newest folder for the last checkpoint whatever is in it. So a folder whose
state cannot be read was never finished. Nothing on disk is changed.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from adaptc.adapter_files.directory import read_adapter
from adaptc.adapter_files.format import check_no_model
from adaptc.adapter_files.stable_read import OpenedFile
from adaptc.errors import CheckpointError
from adaptc.state.adapter_output import TRAINER_WEIGHTS, has_other_model

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
#: the file of a checkpoint that Trainer writes last
TRAINER_STATE_NAME = "trainer_state.json"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in the directory of a Trainer's run, for ``resume_from_checkpoint``.

    Checkpoints that a killed process left unfinished are passed over.

    Args:
        directory: the ``output_dir`` of the run.

    Returns:
        the path; None where there is no checkpoint, which ``resume_from_checkpoint`` takes too.

    Raises:
        CheckpointError: the directory cannot be read, or a finished checkpoint's adapter is damaged.

    Example:
        >>> print(adaptc.training.last_checkpoint("."))
        None
    """
    for _, folder in sorted(_checkpoints_by_step(Path(directory)).items(), reverse=True):
        if _is_finished(folder):
            read_adapter(folder)
            return str(folder)
    return None


def _checkpoints_by_step(directory: Path) -> dict[int, Path]:
    """Return steps -> folder for the checkpoints in ``directory``; none where it does not exist."""
    try:
        return {int(m[1]): p for p in directory.iterdir() if (m := _CHECKPOINT_NAME.fullmatch(p.name)) and p.is_dir()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {directory}: {error}") from error


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether a directory has the name of one of Trainer's checkpoints."""
    return _CHECKPOINT_NAME.fullmatch(Path(directory).name) is not None


def check_output_dir(directory: str | os.PathLike[str], first_step: int, last_step: int) -> None:
    """Raise CheckpointError where a run that writes to ``directory`` would find a whole model there.

    The run goes from step ``first_step`` to ``last_step``. Its adapters would hide that model, or be taken for it.
    """
    steps = {n: p for n, p in _checkpoints_by_step(Path(directory)).items() if first_step < n <= last_step}
    for folder in (Path(directory), *steps.values()):
        check_no_model(folder)
        if has_other_model(folder):
            raise CheckpointError(
                f"{folder / TRAINER_WEIGHTS} is there, and not an adapter's. The run would write its adapters beside "
                "it: choose another output_dir, or move that file"
            )


def _is_finished(folder: Path) -> bool:
    try:
        with OpenedFile(folder / TRAINER_STATE_NAME) as file:
            return isinstance(json.loads(file.read_bytes()), dict)
    except (CheckpointError, OSError, ValueError, RecursionError):
        return False
