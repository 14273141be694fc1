"""Name the files that adaptc adds to the archive of a program or of a package, and write and read them.

They are adapters by name, the certificate, and the table of a base that lies elsewhere. Their records lie in a folder
of their own: torch's loaders ignore what is there.

``copy_records`` writes an archive again without some of its records, so that others can take their place. torch aligns
the data of records, so that they can be mapped into memory; so does the copy.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaptc.archives.archive import ADDED_RECORD_PATTERN, Archive, Record, open_archive
from adaptc.archives.refusal import UnsafeFile, printable_path
from adaptc.errors import CheckpointError

#: the folder of the records; names of added files are relative to it
ADDED_FOLDER = "data/adaptc/"
ADAPTERS_FOLDER = "adapters/"
ADAPTERS_INDEX = "adapters.json"
CERTIFICATE_FILE = "certificate.json"
BASE_TABLE_FILE = "base.json"
_ADDED_RECORD = re.compile(ADDED_RECORD_PATTERN)
#: the hash of a graph or of code, and what it is of
GraphHash = Mapping[str, str]
#: characters that no record's name has
_FORBIDDEN_CHARACTERS = re.compile(r"[/\\:\x00-\x1f\x7f]")
_MAX_NAME_LENGTH = 200
_ALIGNMENT = 64
_HEADER_BYTES = 30
_CHUNK = 1 << 20
_ZIP64_BYTES, _ZIP64_EXTRA_BYTES = 1 << 31, 20


@dataclass(frozen=True)
class AddedFiles:
    """Files to add to an archive, by name.

    ``certify`` makes the certificate, once the hash of the graph or the code in the archive is known. None adds none.
    """

    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    certify: Callable[[GraphHash], bytes] | None = None

    def complete(self, hash_graph: Callable[[], GraphHash]) -> dict[str, bytes]:
        """Return all files, the certificate among them. ``hash_graph`` returns the hash for it."""
        certificate = {} if self.certify is None else {CERTIFICATE_FILE: self.certify(hash_graph())}
        return {**self.files, **certificate}


def is_file_name(name: str) -> bool:
    """Return whether ``name`` can be one part of the path of an added file."""
    is_short = 0 < len(name) <= _MAX_NAME_LENGTH
    return is_short and not name.startswith(".") and not _FORBIDDEN_CHARACTERS.search(name) and name.isprintable()


def write_added_files(path: Path, files: Mapping[str, bytes]) -> None:
    """Add ``files`` by name to the archive at ``path``. Raises OSError."""
    if not files:
        return
    with open_archive(path) as archive:
        root = archive.root
    with zipfile.ZipFile(path, "a") as writer:
        for name, data in files.items():
            writer.writestr(f"{root}/{ADDED_FOLDER}{name}", data)


def read_added_files(archive: Archive, folder: str = "") -> dict[str, bytes]:
    """Return the added files whose names begin with ``folder``, by name. Raises UnsafeFile for a damaged one."""
    found = [n for n in archive.records if n.startswith(ADDED_FOLDER + folder) and _ADDED_RECORD.fullmatch(n)]
    return {name.removeprefix(ADDED_FOLDER): archive.read_record(name, archive.size) for name in found}


def read_added_file(archive: Archive, name: str, max_bytes: int = 16 << 20) -> bytes | None:
    """Return one added file, or None where there is none of this name. Raises UnsafeFile for a damaged one."""
    record = ADDED_FOLDER + name
    return archive.read_record(record, max_bytes) if record in archive.records else None


def check_file_name(name: str, description: str) -> str:
    """Return ``name`` where it can be a part of the path of an added file. Raises UnsafeFile otherwise."""
    if not is_file_name(name):
        raise UnsafeFile(f"{description} {name[:60]!r} is no plain name")
    return name


def read_added_files_of(path: Path) -> dict[str, bytes]:
    """Return the added files of the archive at ``path``; none of what is no archive, which other readers refuse.

    Raises CheckpointError for a damaged file; of an adapter it names the adapter.
    """
    try:
        with open_archive(path) as archive:
            try:
                return read_added_files(archive)
            except UnsafeFile as error:
                raise CheckpointError(
                    f"{printable_path(path)} is damaged: {error}. Save or download it again"
                ) from error
    except (UnsafeFile, OSError):
        return {}


def copy_records(archive: Archive, target: Path, is_kept: Callable[[str], bool]) -> None:
    """Write the records of ``archive`` whose names ``is_kept`` to the new archive ``target``, in their order.

    Raises OSError, and UnsafeFile where the archive is damaged.
    """
    records = sorted((r for r in archive.records.values() if is_kept(r.name)), key=lambda r: r.offset)
    with target.open("wb") as file, zipfile.ZipFile(file, "w") as writer:
        for record in records:
            archive.sha256(record.name)  # raises where its bytes are damaged, which the copy would hide
            info = zipfile.ZipInfo(f"{archive.root}/{record.name}")
            info.extra = _padding(file.tell(), info, record)
            with writer.open(info, "w", force_zip64=record.size >= _ZIP64_BYTES) as out:
                for start in range(0, record.size, _CHUNK):
                    out.write(archive.read_at(record.offset + start, min(_CHUNK, record.size - start)))


def _padding(offset: int, info: zipfile.ZipInfo, record: Record) -> bytes:
    """Return an extra field that makes the data of a record at ``offset`` begin at a multiple of the alignment."""
    start = offset + _HEADER_BYTES + len(info.filename.encode()) + 4
    start += _ZIP64_EXTRA_BYTES if record.size >= _ZIP64_BYTES else 0
    length = -start % _ALIGNMENT
    return struct.pack("<2sH", b"FB", length) + b"Z" * length
