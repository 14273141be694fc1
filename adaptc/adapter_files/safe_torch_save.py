"""Provide a file for torch's archive writer, which ends the process when a write raises.

``torch.save`` and ``torch.export.save`` write their archives in C++. There an error of a write is thrown once more
while the writer is destroyed, and C++ then calls ``std::terminate``. So this file never raises inside. It accepts
everything, remembers the first error, and raises it when torch is done. A signal handler may raise at any line of
Python. In the main thread, where handlers run, signals therefore wait until then as well.

Paths that are not UTF-8 work, too, which torch's own files refuse.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast


@contextmanager
def open_for_torch_save(path: Path) -> Generator[IO[bytes]]:
    """Run the block with a new file to hand to torch.

    Afterwards it raises the first error of the disk, or what a delayed signal handler raises, such as
    KeyboardInterrupt.
    """
    file = _NonRaisingFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666))
    try:
        with _delay_signals(file):
            yield cast(IO[bytes], file)
    except BaseException as exc:
        if file.error is not None and exc is not file.error:  # torch's error is only a consequence of it
            raise file.error from exc
        raise
    finally:
        file.close_file()
    if file.error is not None:
        raise file.error


@contextmanager
def _delay_signals(file: _NonRaisingFile) -> Generator[None]:
    """Run the block, and handle signals that come during it afterwards.

    A signal that raises KeyboardInterrupt also ends the writing, since nobody will want the file.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
        return
    handlers = {n: h for n in signal.valid_signals() if callable(h := signal.getsignal(n))}
    pending: list[tuple[int, FrameType | None]] = []
    is_active = [True]

    def handle_later(number: int, frame: FrameType | None) -> None:
        if not is_active:  # restoring an earlier handler raised, so this one stayed
            handlers[signal.Signals(number)](number, frame)
            return
        pending.append((number, frame))
        if handlers[signal.Signals(number)] is signal.default_int_handler:
            file.is_stopped = True

    try:
        for number in handlers:
            signal.signal(number, handle_later)
        yield
    finally:
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        finally:
            is_active.clear()
            for number, frame in pending:
                handlers[signal.Signals(number)](number, frame)


class _NonRaisingFile(io.RawIOBase):
    """A file that never raises, and is seekable only in name.

    torch writes from the beginning to the end, and seeks once, when all is written.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.error: BaseException | None = None
        #: whether all later writes are ignored
        self.is_stopped = False

    def write(self, data: Any) -> int:
        size = 0
        try:
            left = memoryview(data).cast("B")
            size = left.nbytes
            # After an error there is nothing to write to, nor when torch destroys a writer after finish().
            while left and self.error is None and not self.is_stopped and self._fd >= 0:
                left = left[os.write(self._fd, left) :]
        except BaseException as exc:
            self.error = self.error or exc
        return size

    def close_file(self) -> None:
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
