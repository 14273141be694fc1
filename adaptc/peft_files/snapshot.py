"""Reads of files that somebody may be writing to: what was read is of one moment, or the read is tried again.

A file is opened once, read once, and looked at again at the end, while it is still open: where its path names another
file by then, or its size or time has changed, what was read may be half of a change. A writer of adapters takes the
config away before the new weights appear, so a config that is still there after the weights were read belongs to them.
That the file is open keeps its number from being given to the next one.

Before: a function that reads and, at the end, checks. After: what it read at a quiet moment, or a CheckpointError.
Nothing stays mapped or open. Programs that write weights and config in place, one after the other, as PEFT does, give
no sign between the two; whoever reads while these write must have them write aside, and rename the directory.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from adaptc.errors import CheckpointError

T = TypeVar("T")
#: seconds to wait before another try, about half a second in all
PAUSES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256)
#: how often what is missing is looked for again although nothing says that somebody writes
LOOKS = 2
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Unsettled(CheckpointError):
    """What was found may be half of a change; the next try tells. ``certain``: something did change."""

    def __init__(self, message: str, certain: bool = True) -> None:
        super().__init__(message)
        self.certain = certain


def settled(read: Callable[[], T]) -> T:
    """What ``read`` returns as soon as it does not raise :class:`Unsettled`."""
    looks = 0
    for pause in PAUSES:
        try:
            return read()
        except Unsettled as exc:
            looks += not exc.certain
            if looks > LOOKS:
                raise CheckpointError(str(exc)) from exc.__cause__
        time.sleep(pause)
    try:
        return read()
    except Unsettled as exc:
        raise CheckpointError(str(exc)) from exc.__cause__


class Opened:
    """A file that is open for reading. Raises CheckpointError where it cannot be, :class:`Unsettled` when it is gone;
    ``with`` closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, _FLAGS)
        except FileNotFoundError as exc:
            raise Unsettled(f"{path} disappeared while it was to be read. Is something else writing there?") from exc
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{path} cannot be opened: {exc}. Check its permissions.") from exc
        try:
            found = os.fstat(self.fd)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a file. Save or download it again.")
            self.size, self._then = found.st_size, _identity(found)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def bytes(self) -> bytes:
        """All of it. Raises as :meth:`into`."""
        data = bytearray(self.size)
        self.into(data)
        return bytes(data)

    def into(self, memory: Any) -> None:
        """Fill ``memory`` from the beginning of the file, in one pass. Raises where the file has become shorter."""
        left, at = memoryview(memory).cast("B"), 0
        try:
            while left:
                count = os.preadv(self.fd, [left], at) if hasattr(os, "preadv") else _seek_and_read(self.fd, left, at)
                if count == 0:
                    raise Unsettled(f"{self.path} became shorter while it was read: something else is writing to it.")
                left, at = left[count:], at + count
        except OSError as exc:
            raise CheckpointError(f"{self.path} cannot be read: {exc}.") from exc

    def check(self) -> None:
        """Raise :class:`Unsettled` where this is not the file, as it is, that its path names."""
        try:
            same = self._then == _identity(os.fstat(self.fd)) == _identity(os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise Unsettled(
                f"{self.path} kept changing while it was read: something else is writing to it. Read it again when "
                "that is done, or have it written aside and renamed."
            )


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _seek_and_read(fd: int, memory: memoryview, at: int) -> int:
    os.lseek(fd, at, os.SEEK_SET)
    data = os.read(fd, len(memory))
    memory[: len(data)] = data
    return len(data)
