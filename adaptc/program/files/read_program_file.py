"""Read the file of a program: of anyone where the room ``safe_pt2`` is there, else only what ``adaptc.save`` wrote.

This is the only file that imports that room. Without it, files are read by ``torch.export.load``, which unpickles what
is in them. They must then have the seal that ``adaptc.save`` puts on its files. It tells such a file from others, and
from one that was damaged; it does not tell who wrote the file, since a forger can compute it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.export import ExportedProgram

from adaptc.archives.archive import MODEL_RECORD, Archive, check_records, open_archive
from adaptc.archives.checksum import CHECKSUM_RECORD, verify_checksum
from adaptc.archives.refusal import UnsafeFile, raises_checkpoint_error
from adaptc.passes.graph.graph_lock import hold_graph_lock


class ProgramContent(Protocol):
    """The content of a program's file, as far as it is read before torch makes a program of it."""

    def uses_namespace(self, namespace: str, /, besides: str = "") -> bool:
        """Return whether it calls operators of this namespace of ``torch.ops`` other than the one named ``besides``."""
        ...

    def to_exported_program(self) -> ExportedProgram:
        """Return the program. Raises CheckpointError where torch cannot make it."""
        ...


@dataclass(frozen=True)
class SealedProgram:
    """The bytes of a file with the seal of ``adaptc.save``, and those of its graph."""

    path: Path
    data: bytes
    graph_text: bytes

    def uses_namespace(self, namespace: str, /, besides: str = "") -> bool:
        prefix = f'"torch.ops.{namespace}.'
        return self.graph_text.count(prefix.encode()) > self.graph_text.count(f"{prefix}{besides or '.'}.".encode())

    def to_exported_program(self) -> ExportedProgram:
        with raises_checkpoint_error(self.path), hold_graph_lock():
            return torch.export.load(io.BytesIO(self.data))


def read_sealed_program(path: Path) -> ProgramContent:
    """Read a file that ``adaptc.save`` wrote. Raises CheckpointError for any other file, and for a damaged one."""
    with raises_checkpoint_error(path), open_archive(path) as archive:
        check_records(archive)
        if CHECKSUM_RECORD not in archive.records:
            raise UnsafeFile(
                "it has no seal of adaptc.save, and the checks of foreign files are not installed (adaptc.safe_pt2): "
                "install adaptc with them, or save the program with adaptc.save"
            )
        verify_checksum(archive)
        for record in archive.records:
            archive.sha256(record)  # raises where the bytes are not those that the seal is for
        return SealedProgram(path, archive.read_at(0, archive.size), _graph_text(archive))


def _graph_text(archive: Archive) -> bytes:
    return archive.read_record(MODEL_RECORD, archive.records[MODEL_RECORD].size)


try:
    from adaptc.safe_pt2.program import read_program  # pyright: ignore[reportUnusedImport]  # for others
except ModuleNotFoundError as error:
    if error.name != "adaptc.safe_pt2":
        raise
    read_program = read_sealed_program
