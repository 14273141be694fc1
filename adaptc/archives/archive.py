"""Read a zip archive as torch writes it, opened once: its records, and the bytes of each.

The content of the file may be cut short, forged or hostile. Records must be uncompressed (torch never compresses), lie
inside the file and not overlap. Each must have a name of its own, and all lie in one folder. Bytes that do not have the
archive's checksum are refused.

``check_records`` checks that the records are those of a program, and recognises archives of other kinds.
``read_sidecar`` reads a text that was saved beside a program in its file, by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from adaptc.archives.refusal import UnsafeFile, describe_error, printable_path, short_repr
from adaptc.errors import BackendError, CheckpointError
from adaptc.locks import reset_after_fork

_MAX_RECORDS = 200_000
_MAX_DIRECTORY_BYTES = 64 << 20
_CHUNK = 1 << 18  # a chunk is read, and summed while it is in the cache
_ALLOWED_FLAGS = 0x808  # sizes after the data, names in UTF-8
_RECORD_NAME = re.compile(r"[^/\\\x00-\x1f\x7f:]+(/[^/\\\x00-\x1f\x7f:]+)+")


@dataclass(frozen=True)
class Record:
    """The place of a record in the file. ``name`` is without the folder that all records are in."""

    name: str
    offset: int
    size: int
    checksum: int


class Archive:
    """The records of an open file. Reading is safe from several threads at once."""

    def __init__(self, file: BinaryIO, *, on_disk: bool = False) -> None:
        self._file = file
        self._fd = file.fileno() if on_disk and hasattr(os, "preadv") else None
        self._lock = reset_after_fork(Lock())
        self.size = file.seek(0, os.SEEK_END)
        self._check_directory()
        try:
            with zipfile.ZipFile(file) as found:
                entries, start = found.infolist(), found.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
            raise UnsafeFile(f"it is not a zip archive, or is cut short or damaged ({error})") from error
        #: ``root`` is the folder that all records are in; ``records`` has them by their names inside it
        self.root, self.records = _by_inner_name(self._checked_records(entries, start))

    def _check_directory(self) -> None:
        """Refuse a directory that is too long, before it is parsed."""
        tail = self.read_at(max(0, self.size - 42), min(self.size, 42))
        # torch writes no comment after the end record, so it must be the last. Otherwise a zip inside of a file that is
        # cut short could be taken for the file.
        if tail[-22:-18] != b"PK\5\6":
            raise UnsafeFile("it is not a zip archive, or is cut short")
        count, length = struct.unpack("<HL", tail[-12:-6])
        if tail.startswith(b"PK\6\7"):
            where = int.from_bytes(tail[8:16], "little")
            head = self.read_at(where, 56) if 0 <= where <= self.size - 56 else b""
            if not head.startswith(b"PK\6\6"):
                raise UnsafeFile("its directory is damaged")
            count, length = struct.unpack("<QQ", head[32:48])
        if count > _MAX_RECORDS or length > _MAX_DIRECTORY_BYTES:
            raise UnsafeFile(f"its directory claims {count} records in {length} bytes; no program has that many")

    def _checked_records(self, entries: list[zipfile.ZipInfo], end: int) -> Iterator[Record]:
        if len(entries) > _MAX_RECORDS:
            raise UnsafeFile(f"it has {len(entries)} records; no program has that many")
        if entries and min(e.header_offset for e in entries):
            raise UnsafeFile("its first record is not at its beginning: something was put in front, or cut off")
        for entry, next_offset in _with_ends(sorted(entries, key=lambda e: e.header_offset), end):
            name = entry.orig_filename
            if not _RECORD_NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
                raise UnsafeFile(f"a record is called {short_repr(name)}, which is no name that torch gives")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise UnsafeFile(
                    f"record {short_repr(name)} is compressed ({entry.compress_size} bytes for {entry.file_size}); "
                    "torch never compresses, so it can only be a decompression bomb"
                )
            if entry.flag_bits & ~_ALLOWED_FLAGS:
                raise UnsafeFile(f"record {short_repr(name)} is encrypted, or of a kind that torch does not write")
            start = entry.header_offset
            head = self.read_at(start, 30) if 0 <= start <= self.size - 30 else b""
            if not head.startswith(b"PK\3\4"):
                raise UnsafeFile(f"record {short_repr(name)} is not where the directory says it is")
            long_name, extra = struct.unpack("<HH", head[26:30])
            offset = start + 30 + long_name + extra
            if offset + entry.file_size > next_offset:
                raise UnsafeFile(
                    f"record {short_repr(name)} claims {entry.file_size} bytes and there is room for "
                    f"{max(next_offset - offset, 0)}: it overlaps another, or the file was cut short"
                )
            if self.read_at(start + 30, long_name) != name.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
                raise UnsafeFile(f"record {short_repr(name)} has another name in front of its data")
            yield Record(name, offset, entry.file_size, entry.CRC)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of the file from ``offset``, or fewer where the file ends."""
        out = bytearray(size)
        return bytes(out[: self._read_into(memoryview(out), offset)])

    def _read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view) and (got := self._read_once(view[done:], offset + done)):
            done += got
        return done

    def _read_once(self, view: memoryview, offset: int) -> int:
        if self._fd is not None:  # without the lock, since preadv has no file position to share
            return os.preadv(self._fd, [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)  # type: ignore[attr-defined]  # of every binary file

    def read_record_into(self, record: Record, view: memoryview) -> None:
        """Read a record into ``view``, which has exactly its size."""
        self._read_chunks(record, lambda start, size: view[start : start + size])

    def _read_chunks(
        self,
        record: Record,
        buffer_for: Callable[[int, int], memoryview],
        on_chunk: Callable[[memoryview], object] = lambda part: None,
    ) -> None:
        """Read a record chunk by chunk into the memory that ``buffer_for`` returns for a start and size, and call
        ``on_chunk`` with it.

        Raises UnsafeFile where the checksum of the record is another one.
        """
        checksum = 0
        for start in range(0, record.size, _CHUNK):
            chunk = buffer_for(start, min(_CHUNK, record.size - start))
            if self._read_into(chunk, record.offset + start) != len(chunk):
                raise UnsafeFile("the file became shorter while it was read", f"record {record.name!r}")
            checksum = zlib.crc32(chunk, checksum)
            on_chunk(chunk)
        if checksum != record.checksum:
            raise UnsafeFile(
                "its bytes do not have the checksum of the archive: it is damaged", f"record {record.name!r}"
            )

    def sha256(self, name: str) -> str:
        """Return the hex SHA-256 of a record's bytes, which are never in memory as a whole."""
        record, out = self.records[name], hashlib.sha256()
        self._read_chunks(record, lambda start, size: memoryview(bytearray(size)), out.update)
        return out.hexdigest()

    def read_record(self, name: str, max_bytes: int) -> bytes:
        """Return all bytes of a record. Raises UnsafeFile where it is missing, or has more than ``max_bytes`` bytes."""
        record = self.records.get(name)
        if record is None:
            raise UnsafeFile(f"there is no record {name!r}")
        if record.size > max_bytes:
            raise UnsafeFile(
                f"it has {record.size} bytes, more than the {max_bytes} that adaptc reads", f"record {name!r}"
            )
        out = bytearray(record.size)
        self.read_record_into(record, memoryview(out))
        return bytes(out)


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Run the block with the archive at ``path``. All that is checked and read comes from one open file."""
    with path.open("rb", buffering=0) as file:
        yield Archive(file, on_disk=True)  # type: ignore[arg-type]  # a FileIO is as good


def _with_ends(entries: list[zipfile.ZipInfo], end: int) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """Return each entry with the offset at which the next one begins, which is ``end`` for the last."""
    starts = [e.header_offset for e in entries[1:]] + [end]
    return zip(entries, starts, strict=True)


def _by_inner_name(records: Iterator[Record]) -> tuple[str, Mapping[str, Record]]:
    """Return the one folder that all records are in, and the records by their names inside it."""
    out: dict[str, Record] = {}
    roots: set[str] = set()
    for r in records:
        root, _, name = r.name.partition("/")
        if name in out:
            raise UnsafeFile(f"it has two records called {short_repr(name)}")
        roots.add(root)
        out[name] = Record(name, r.offset, r.size, r.checksum)
    if len(roots) > 1:
        raise UnsafeFile(
            f"its records lie in {len(roots)} folders, {short_repr(min(roots))} and others; torch makes one"
        )
    return min(roots, default=""), out


MODEL_RECORD = "models/model.json"
EXAMPLE_INPUTS_RECORD = "data/sample_inputs/model.pt"
WEIGHTS_FOLDER = "data/weights"
CONSTANTS_FOLDER = "data/constants"
WEIGHTS_TABLE = f"{WEIGHTS_FOLDER}/model_weights_config.json"
CONSTANTS_TABLE = f"{CONSTANTS_FOLDER}/model_constants_config.json"

_REQUIRED_RECORDS = (
    "archive_format",
    "archive_version",
    MODEL_RECORD,
    EXAMPLE_INPUTS_RECORD,
    WEIGHTS_TABLE,
    CONSTANTS_TABLE,
)
#: the pattern of the records that adaptc adds to programs and packages; ``archives.added_files`` names them
ADDED_RECORD_PATTERN = r"data/adaptc/(?:(?:adapters|certificate|base)\.json|adapters(?:/[^/]+){2,4})"
_ALLOWED_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.]+|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/((tensor|custom_obj|opaque_obj)_\d+|model_constants_config\.json)"
    rf"|extra/.+|data/extra/.+|{ADDED_RECORD_PATTERN}",
    re.ASCII,
)


def check_records(archive: Archive) -> None:
    """Refuse archives of other kinds, and records that a program does not have.

    Files beside the program (``extra_files``) and pickled objects are allowed here, and are never read. A use of such
    an object is refused where it occurs.
    """
    found = archive.records
    if any(n.startswith("data/aotinductor/") for n in found):
        made = (
            "that adaptc.package wrote" if "data/extra/adaptc.json" in found else "of AOTInductor, made without adaptc"
        )
        raise UnsafeFile(
            f"it is a package {made}, and holds compiled code, which torch.export.load would run at once. If you trust "
            "its author open it with adaptc.load_package, else ask for a file of adaptc.save"
        )
    if "serialized_exported_program.json" in found:
        raise UnsafeFile("it was written by torch 2.7 or older; load it there, and save it with a newer torch")
    for name in _REQUIRED_RECORDS:
        if name not in found:
            raise UnsafeFile(f"there is no record {name!r}")
    for name in found:
        if not _ALLOWED_RECORD.fullmatch(name):
            others = name.startswith(("models/", "data/"))
            hint = "; adaptc reads files of one program, of the name 'model'" if others else ""
            raise UnsafeFile(f"record {short_repr(name)} is none that a program has{hint}")
    for name, wanted in (("archive_format", b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
        if name in found and (text := archive.read_record(name, 64)) != wanted:
            raise UnsafeFile(
                f"expected {name} {wanted.decode()}, found {short_repr(text.decode(errors='backslashreplace'))}"
            )


def no_package_error(path: Path, names: Sequence[str]) -> BackendError | CheckpointError:
    """Return the error for a file at ``path`` with records of these ``names``, none of which is a manifest."""
    if any(n.startswith("data/aotinductor/") for n in names):
        return BackendError(
            f"{printable_path(path)} was packaged without adaptc, so nothing in it says where adapters go. Run it with "
            "torch._inductor.aoti_load_package, or package the adapted program with adaptc.package."
        )
    if any(n.startswith("models/") for n in names):
        return CheckpointError(
            f"{printable_path(path)} is an exported program, not a package; open it with adaptc.load"
        )
    return CheckpointError(f"{printable_path(path)} is an archive, but not one that adaptc.package wrote")


def is_package(path: Path) -> bool:
    """Return whether a file has compiled code in it, as far as its table of contents tells; it may be damaged."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            return False
        with zipfile.ZipFile(path) as archive:
            return any("/data/aotinductor/" in name for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


#: the most bytes of a text that are read
_MAX_BYTES = 16 << 20


def read_sidecar(path: Path, name: str) -> Any:
    """Return the JSON value in the text ``name`` of a program's file, or None where the file has no such text.

    Raises CheckpointError where it cannot be read.
    """
    try:
        with open_archive(path) as archive:
            record = next((r for r in (f"extra/{name}", f"data/extra/{name}") if r in archive.records), None)
            return None if record is None else json.loads(archive.read_record(record, _MAX_BYTES))
    except (UnsafeFile, ValueError, OSError, RecursionError) as error:
        why = str(error) if isinstance(error, UnsafeFile) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)}: {name} cannot be read: {why}. Save the program again"
        ) from error
