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
class AdaptedModule:
    """A module with an adapter.

    ``tensors`` has PEFT's slots. ``scale`` is the factor on the adapter's update.
    """

    module: str
    tensors: Mapping[str, Tensor]
    scale: float
    rank: int


@dataclass(frozen=True, eq=False)
class FileContent:
    """The content of a file: its tensors by key, and the texts of its header."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]


class Writer(Protocol):
    """A format that can be written."""

    @property
    def name(self) -> str: ...

    def resolve_path(self, path: Path) -> Path:
        """Return the file that ``path`` means. Raises CheckpointError for a path that means none."""
        ...

    def file_content(
        self, modules: Sequence[AdaptedModule], component: str | None, config: Mapping[str, Any], names: Sequence[str]
    ) -> FileContent:
        """Return the content of a file with these modules.

        ``component`` is the pipeline's, where there is one. ``config`` is as PEFT stores it. ``names`` are all modules
        of the model. Raises CheckpointError for what the format cannot hold.
        """
        ...


def rename_slots(format_name: str, names: Mapping[str, str], adapted: AdaptedModule) -> dict[str, Tensor]:
    """Return the tensors of a module under a format's names. Raises CheckpointError for a tensor without a name
    there."""
    if odd := [n for n in adapted.tensors if n not in names]:
        raise CheckpointError(
            f"the format {format_name} cannot hold {odd[0]!r} of {adapted.module!r}: it has no name for it. Write it "
            "as format='peft'."
        )
    return {names[n]: t for n, t in adapted.tensors.items()}


def write_format_file(path: Path, content: FileContent) -> Path:
    """Write a safetensors file aside and move it into place. Raises CheckpointError, and leaves the old file as it
    was."""
    try:
        data = safe_load.to_dense(content.tensors)
        made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write.atomic_replace(path, "new.safetensors") as new:
                safe_load.save_tensors(data, new, safe_serialization=True, metadata=content.header)
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
