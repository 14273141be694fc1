"""Seal a file with a hash of all its records, so that a file that was edited or damaged on disk is refused.

The hash is over the names, sizes and checksums that the archive states for its records. The checksums are compared
where the records are read. It is no signature: a forger can forge it, too, and files of torch have none.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from adaptc.safe_pt2.archive import Archive, opened
from adaptc.safe_pt2.refusal import UnsafeFile

#: torch.export.load takes this record for one of the extra files that users put beside a program
SEAL = "data/extra/adaptc.sha256"


def seal(path: Path) -> None:
    """Add the record with the hash to an archive that torch wrote. Raises OSError."""
    with opened(path) as archive:
        text, root = _hash(archive), archive.root
    with zipfile.ZipFile(path, "a") as writer:
        writer.writestr(f"{root}/{SEAL}", text)


def check_seal(archive: Archive) -> None:
    """Raise UnsafeFile where the archive has a seal, and that is of other records."""
    if SEAL in archive.records and archive.read(SEAL, 64) != _hash(archive).encode():
        raise UnsafeFile("it was changed after adaptc.save wrote it, or is damaged", f"record {SEAL!r}")


def _hash(archive: Archive) -> str:
    lines = (f"{r.name}\n{r.size} {r.checksum}\n" for r in archive.records.values() if r.name != SEAL)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
