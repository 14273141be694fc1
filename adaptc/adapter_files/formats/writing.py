"""Write an adapter as a file of another format, with the protocol of a format that can be written.

Input is the tensors of each module by PEFT's slots, with scale and rank. Either the complete new file is there
afterwards, or the old one. A CheckpointError names what the format cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from adaptc.adapter_files import atomic_write, safe_load
from adaptc.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Adapted:
    """A module with an adapter.

    ``tensors`` has PEFT's slots. ``scale`` is the factor on the adapter's update.
    """

    module: str
    tensors: Mapping[str, Tensor]
    scale: float
    rank: int


@dataclass(frozen=True, eq=False)
class Content:
    """The content of a file: its tensors by key, and the texts of its header."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]


class Writer(Protocol):
    """A format that can be written."""

    @property
    def name(self) -> str: ...

    def file(self, path: Path) -> Path:
        """Return the file that ``path`` means. Raises CheckpointError for a path that means none."""
        ...

    def content(
        self, modules: Sequence[Adapted], component: str | None, config: Mapping[str, Any], names: Sequence[str]
    ) -> Content:
        """Return the content of a file with these modules.

        ``component`` is the pipeline's, where there is one. ``config`` is as PEFT stores it. ``names`` are all modules
        of the model. Raises CheckpointError for what the format cannot hold.
        """
        ...


def slot_names(form: str, names: Mapping[str, str], one: Adapted) -> dict[str, Tensor]:
    """Return the tensors of a module under a format's names. Raises CheckpointError for a tensor without a name
    there."""
    if odd := [n for n in one.tensors if n not in names]:
        raise CheckpointError(
            f"the format {form} cannot hold {odd[0]!r} of {one.module!r}: it has no name for it. Write it as "
            f"format='peft'."
        )
    return {names[n]: t for n, t in one.tensors.items()}


def write_file(path: Path, content: Content) -> Path:
    """Write a safetensors file aside and move it into place. Raises CheckpointError, and leaves the old file as it
    was."""
    try:
        data = safe_load.dense(content.tensors)
        made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write.replacing(path, "new.safetensors") as new:
                safe_load.save_tensors(data, new, safe=True, header=content.header)
        except BaseException:
            for p in made:
                p.rmdir()
            raise
    except CheckpointError:
        raise
    except Exception as exc:  # safetensors, torch and the OS each have their own types for a full disk
        reason = f"{type(exc).__name__}: {exc}"
        raise CheckpointError(f"could not write {path} ({reason}). What was there before is unchanged.") from exc
    return path
