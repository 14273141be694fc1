"""Write several directories as one change: make them in a stage beside their places, then rename them into place.

Either all of the new directories are there afterwards, or the old ones are as they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adaptc.adapter_files.atomic_write import OLD, Stranded, check_new, staging
from adaptc.adapter_files.format import CARD_NAME
from adaptc.adapter_files.locate import plain_name
from adaptc.errors import CheckpointError


@contextmanager
def written_together(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """Run the block with a stage in which it writes directories of these names, then move them into ``root``.

    A model card is moved, too, where ``root`` has none. Raises CheckpointError for bad names and places, and for full
    disks.
    """
    for name in names:
        place = root / plain_name(name, "adapter_name")
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"cannot write an adapter to {place}: it is a file. Choose a directory.")
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"cannot write adapters to {root}: it is a file. Choose a directory.")
    try:
        with staging(root) as stage:
            yield stage
            _move(stage, root, names)
    except OSError as error:
        raise CheckpointError(f"could not write to {root}: {error}. What was there before is unchanged.") from error


def _move(stage: Path, root: Path, names: Sequence[str]) -> None:
    old = stage / OLD
    old.mkdir()
    gone: list[str] = []
    come: list[str] = []
    try:
        for name in names:
            check_new(root / name)
            if os.path.lexists(root / name):
                os.rename(root / name, old / name)
                gone.append(name)
            os.rename(stage / name, root / name)
            come.append(name)
        if not os.path.lexists(root / CARD_NAME) and (stage / CARD_NAME).is_file():
            os.rename(stage / CARD_NAME, root / CARD_NAME)
    except BaseException:
        try:
            for name in come:
                os.rename(root / name, stage / name)
            for name in gone:
                os.rename(old / name, root / name)
        except OSError as error:
            raise Stranded(f"{root} could not be put back as it was ({error}): what was there is in {old}") from error
        raise
