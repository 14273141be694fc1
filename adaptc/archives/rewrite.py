"""Write the archive of a program or a package again without some of its records, byte for byte otherwise.

torch aligns the data of records, so that they can be mapped into memory; so does this.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from adaptc.archives.archive import Archive, Record

_ALIGNMENT = 64
_HEADER_BYTES = 30
_CHUNK = 1 << 20
_ZIP64_BYTES, _ZIP64_EXTRA_BYTES = 1 << 31, 20


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
