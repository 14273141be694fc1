"""Read files that another program may be writing to: what is read is of one moment, or is read again.

A file is opened once, read once, and checked at the end while it is still open. Where its path names another file by
then, or its size or time has changed, the data may be half of a change. An open file keeps its inode number, so that no
new file can get it. adaptc's writer removes the config before the new weights appear. So a config that is still there
after the weights were read belongs to them.

Nothing stays mapped or open. Programs that write weights and config in place, one after the other, as PEFT does, give
no sign in between. Anyone who reads during such writes must have the files written aside, and rename the directory.

Configs are read here, too. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from adaptc.errors import CheckpointError
from adaptc.nesting import MAX_DEPTH, is_nested_too_deep

T = TypeVar("T")
#: the seconds to wait before each new try, about half a second in all
RETRY_DELAYS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256)
#: the number of new tries for a missing file where nothing shows that a write is under way
MAX_UNCERTAIN_RETRIES = 2
MAX_JSON_BYTES = 16 << 20  # the largest real adapter configs are a few hundred KiB
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class FileChangedError(CheckpointError):
    """An error that may come from half of a change, so that the read should be tried again.

    ``certain`` says that something did change.
    """

    def __init__(self, message: str, certain: bool = True) -> None:
        super().__init__(message)
        self.is_certain = certain


def retry_while_changing(read: Callable[[], T]) -> T:
    """Return what ``read`` returns, as soon as it does not raise :class:`FileChangedError`.

    Raises CheckpointError where it still does at the last try.
    """
    looks = 0
    for pause in RETRY_DELAYS:
        try:
            return read()
        except FileChangedError as exc:
            looks += not exc.is_certain
            if looks > MAX_UNCERTAIN_RETRIES:
                raise CheckpointError(str(exc)) from exc.__cause__
        time.sleep(pause)
    try:
        return read()
    except FileChangedError as exc:
        raise CheckpointError(str(exc)) from exc.__cause__


class OpenedFile:
    """A file that is open for reading; ``with`` closes it.

    Making one raises CheckpointError where the file cannot be opened, and :class:`FileChangedError` where it is gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, _OPEN_FLAGS)
        except FileNotFoundError as exc:
            raise FileChangedError(
                f"{path} disappeared while it was to be read. Is something else writing there?"
            ) from exc
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{path} cannot be opened: {exc}. Check its permissions.") from exc
        try:
            found = os.fstat(self.fd)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a file. Save or download it again.")
            self.size, self._opened_identity = found.st_size, _file_identity(found)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read_bytes(self) -> bytes:
        """Return the content of the file. Raises like :meth:`read_into`."""
        data = bytearray(self.size)
        self.read_into(data)
        return bytes(data)

    def read_into(self, memory: Any) -> None:
        """Fill ``memory`` from the beginning of the file, in one pass. Raises Unsettled where the file has become
        shorter."""
        left, at = memoryview(memory).cast("B"), 0
        try:
            while left:
                count = os.preadv(self.fd, [left], at) if hasattr(os, "preadv") else _seek_and_read(self.fd, left, at)
                if count == 0:
                    raise FileChangedError(
                        f"{self.path} became shorter while it was read: something else is writing to it."
                    )
                left, at = left[count:], at + count
        except OSError as exc:
            raise CheckpointError(f"{self.path} cannot be read: {exc}.") from exc

    def check_unchanged(self) -> None:
        """Raise :class:`FileChangedError` where the file has changed since it was opened, or its path names another
        one."""
        try:
            same = self._opened_identity == _file_identity(os.fstat(self.fd)) == _file_identity(os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise FileChangedError(
                f"{self.path} kept changing while it was read: something else is writing to it. Read it again when "
                "that is done, or have it written aside and renamed."
            )


def _file_identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _seek_and_read(fd: int, memory: memoryview, at: int) -> int:
    os.lseek(fd, at, os.SEEK_SET)
    data = os.read(fd, len(memory))
    memory[: len(data)] = data
    return len(data)


def read_json_object(file: OpenedFile) -> dict[str, Any]:
    """Return the JSON object in ``file``. Raises CheckpointError when it is unreadable, no JSON, or no object."""
    path = file.path
    if file.size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is {file.size} bytes long; a config is never that large. Was it overwritten?")
    data = file.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        lfs = lfs_hint(data)
        reason = f"{type(exc).__name__}: {exc}"
        raise CheckpointError(f"{path} is not valid JSON ({reason}).{lfs} Save or download it again.") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object of config fields, but holds a {type(value).__name__}.")
    if is_nested_too_deep(value):
        raise CheckpointError(
            f"{path} has lists and dicts nested deeper than {MAX_DEPTH}, which no config is. Save or download it again."
        )
    return cast("dict[str, Any]", value)


def lfs_hint(start: bytes) -> str:
    """Return a sentence for an error where a file's first bytes are those of a Git LFS pointer, or ''."""
    if start.startswith(b"version https://git-lfs"):
        return " It is a Git LFS pointer, not the file itself: run `git lfs pull`."
    return ""
