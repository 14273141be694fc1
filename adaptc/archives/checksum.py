"""Seal a file with a hash of all its records, so that a file that was edited or damaged on disk is refused.

The hash is over the names, sizes and checksums that the archive states for its records. The checksums are compared
where the records are read. It is no signature: a forger can forge it, too, and files of torch have none.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from adaptc.archives.archive import Archive, open_archive
from adaptc.archives.refusal import UnsafeFile

#: torch.export.load takes this record for one of the extra files that users put beside a program
CHECKSUM_RECORD = "data/extra/adaptc.sha256"


def add_checksum(path: Path) -> None:
    """Add the record with the hash to an archive that torch wrote. Raises OSError."""
    with open_archive(path) as archive:
        text, root = _hash_records(archive), archive.root
    with zipfile.ZipFile(path, "a") as writer:
        writer.writestr(f"{root}/{CHECKSUM_RECORD}", text)


def verify_checksum(archive: Archive) -> None:
    """Raise UnsafeFile where the archive has a seal, and that is of other records."""
    if (
        CHECKSUM_RECORD in archive.records
        and archive.read_record(CHECKSUM_RECORD, 64) != _hash_records(archive).encode()
    ):
        raise UnsafeFile("it was changed after adaptc.save wrote it, or is damaged", f"record {CHECKSUM_RECORD!r}")


def _hash_records(archive: Archive) -> str:
    lines = (f"{r.name}\n{r.size} {r.checksum}\n" for r in archive.records.values() if r.name != CHECKSUM_RECORD)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
