"""A file for torch's archive writer, which ends the process when a write raises.

``torch.save`` and ``torch.export.save`` write their archives in C++. There an error of the disk, or one that a Python
file raises, is thrown once more while the writer is destroyed, and C++ then calls ``std::terminate``. So nothing may
raise inside: the file takes everything, remembers the first error, and raises it when torch is done.

Before: a path. After: the file is complete, or the first error, also one of Ctrl-C. Paths that are not UTF-8, which
torch's own files refuse, are as good as others.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file to hand to torch. Raises what the disk raised, when the block is done."""
    file = _Unraising(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666))
    try:
        yield cast(IO[bytes], file)
    except BaseException as exc:
        if file.error is not None:  # the cause of what torch says
            raise file.error from exc
        raise
    finally:
        file.finish()
    if file.error is not None:
        raise file.error


class _Unraising(io.RawIOBase):
    """Seekable in name alone: torch writes from the beginning to the end, and asks once, when all is written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        size = 0
        try:
            left = memoryview(data).cast("B")
            size = left.nbytes
            # After an error, and when torch destroys a writer late, there is nothing to write to any more.
            while left and self.error is None and self._fd >= 0:
                left = left[os.write(self._fd, left) :]
        except BaseException as exc:
            self.error = self.error or exc
        return size

    def finish(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as exc:
            self.error = self.error or exc

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset
