"""Read files that another program may be writing to: what is read is of one moment, or is read again.

A file is opened once, read once, and checked at the end while it is still open. Where its path names another file by
then, or its size or time has changed, the data may be half of a change. An open file keeps its inode number, so that no
new file can get it. adaptc's writer removes the config before the new weights appear. So a config that is still there
after the weights were read belongs to them.

Nothing stays mapped or open. Programs that write weights and config in place, one after the other, as PEFT does, give
no sign in between. Anyone who reads during such writes must have the files written aside, and rename the directory.
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
#: the seconds to wait before each new try, about half a second in all
PAUSES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256)
#: the number of new tries for a missing file where nothing shows that a write is under way
LOOKS = 2
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Unsettled(CheckpointError):
    """An error that may come from half of a change, so that the read should be tried again.

    ``certain`` says that something did change.
    """

    def __init__(self, message: str, certain: bool = True) -> None:
        super().__init__(message)
        self.certain = certain


def settled(read: Callable[[], T]) -> T:
    """Return what ``read`` returns, as soon as it does not raise :class:`Unsettled`.

    Raises CheckpointError where it still does at the last try.
    """
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


class OpenedFile:
    """A file that is open for reading; ``with`` closes it.

    Making one raises CheckpointError where the file cannot be opened, and :class:`Unsettled` where it is gone.
    """

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
        """Return the content of the file. Raises like :meth:`into`."""
        data = bytearray(self.size)
        self.into(data)
        return bytes(data)

    def into(self, memory: Any) -> None:
        """Fill ``memory`` from the beginning of the file, in one pass. Raises Unsettled where the file has become
        shorter."""
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
        """Raise :class:`Unsettled` where the file has changed since it was opened, or its path names another one."""
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
