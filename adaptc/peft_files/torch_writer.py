"""A file for torch's archive writer, which ends the process when a write raises.

``torch.save`` and ``torch.export.save`` write their archives in C++. There an error of the disk, or one that a Python
file raises, is thrown once more while the writer is destroyed, and C++ then calls ``std::terminate``. So nothing may
raise inside: the file takes everything, remembers the first error, and raises it when torch is done. A signal's handler
may raise at any line of Python, so in the main thread, where handlers run, they wait until then as well.

Before: a path. After: the file is complete, or the first error, also one of Ctrl-C. Paths that are not UTF-8, which
torch's own files refuse, are as good as others.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file to hand to torch. Raises what the disk raised, or a signal's handler, when the block is done."""
    file = _Unraising(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666))
    try:
        with _signals_later(file):
            yield cast(IO[bytes], file)
    except BaseException as exc:
        if file.error is not None and exc is not file.error:  # the cause of what torch says
            raise file.error from exc
        raise
    finally:
        file.finish()
    if file.error is not None:
        raise file.error


@contextmanager
def _signals_later(file: _Unraising) -> Iterator[None]:
    """Signals that come in the block are handled after it. One that Python answers with KeyboardInterrupt also ends
    the writing, as nobody will want the file."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    handlers = {n: h for n in signal.valid_signals() if callable(h := signal.getsignal(n))}
    came: list[tuple[int, FrameType | None]] = []
    inside = [True]

    def later(number: int, frame: FrameType | None) -> None:
        if not inside:  # it stayed, since a handler that was put back before it raised
            handlers[signal.Signals(number)](number, frame)
            return
        came.append((number, frame))
        if handlers[signal.Signals(number)] is signal.default_int_handler:
            file.stop = True

    try:
        for number in handlers:
            signal.signal(number, later)
        yield
    finally:
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        finally:
            inside.clear()
            for number, frame in came:
                handlers[signal.Signals(number)](number, frame)


class _Unraising(io.RawIOBase):
    """Seekable in name alone: torch writes from the beginning to the end, and asks once, when all is written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.error: BaseException | None = None
        #: nothing more is written
        self.stop = False

    def write(self, data: Any) -> int:
        size = 0
        try:
            left = memoryview(data).cast("B")
            size = left.nbytes
            # After an error, and when torch destroys a writer late, there is nothing to write to any more.
            while left and self.error is None and not self.stop and self._fd >= 0:
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
