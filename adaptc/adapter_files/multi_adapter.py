"""Write several directories as one change: make them in a stage beside their places, then rename them into place.

Either all of the new directories are there afterwards, or the old ones are as they were.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adaptc.adapter_files.atomic_write import OLD_FILES_DIR, RollbackError, check_overwrite, open_stage
from adaptc.adapter_files.format import MODEL_CARD_NAME
from adaptc.adapter_files.locate import check_plain_name
from adaptc.errors import CheckpointError


@contextmanager
def write_together(root: Path, names: Sequence[str]) -> Generator[Path]:
    """Run the block with a stage in which it writes directories of these names, then move them into ``root``.

    A model card is moved, too, where ``root`` has none. Raises CheckpointError for bad names and places, and for full
    disks.
    """
    for name in names:
        place = root / check_plain_name(name, "adapter_name")
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"cannot write an adapter to {place}: it is a file. Choose a directory.")
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"cannot write adapters to {root}: it is a file. Choose a directory.")
    try:
        with open_stage(root) as stage:
            yield stage
            _move_directories(stage, root, names)
    except OSError as error:
        raise CheckpointError(f"could not write to {root}: {error}. What was there before is unchanged.") from error


def _move_directories(stage: Path, root: Path, names: Sequence[str]) -> None:
    old = stage / OLD_FILES_DIR
    old.mkdir()
    moved_out: list[str] = []
    moved_in: list[str] = []
    try:
        for name in names:
            check_overwrite(root / name)
            if os.path.lexists(root / name):
                os.rename(root / name, old / name)
                moved_out.append(name)
            os.rename(stage / name, root / name)
            moved_in.append(name)
        if not os.path.lexists(root / MODEL_CARD_NAME) and (stage / MODEL_CARD_NAME).is_file():
            os.rename(stage / MODEL_CARD_NAME, root / MODEL_CARD_NAME)
    except BaseException:
        try:
            for name in moved_in:
                os.rename(root / name, stage / name)
            for name in moved_out:
                os.rename(old / name, root / name)
        except OSError as error:
            raise RollbackError(
                f"{root} could not be put back as it was ({error}): what was there is in {old}"
            ) from error
        raise
