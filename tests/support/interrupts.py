"""Interrupts at chosen lines: a trace function raises KeyboardInterrupt at the n-th line of adaptc that runs."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any, Self

import adaptc
import adaptc.kernels
import adaptc.passes
from adaptc.adapter_files import safe_torch_save

#: folders of the code that is interrupted
ADAPTC_FOLDERS = tuple(str(Path(str(m.__file__)).parent) + "/" for m in (adaptc, adaptc.passes, adaptc.kernels))


#: lines that come just before a `with` is left, where Python handles no signal; that of the `with` itself comes again
LEAVES_A_BLOCK = re.compile(r"\s*(with |(return( None| True| False)?|break|continue)\s*(#.*)?$)")


class LineInterrupt:
    """Counts the lines of adaptc that run in a block, and stops it at one of them. ``files``: ends of the names of the
    files that count, all by default."""

    def __init__(self, stop: int | None = None, files: tuple[str, ...] = ("",)) -> None:
        self.count, self.stop_at, self.files = 0, stop, files

    def __enter__(self) -> Self:
        self.old_trace, self.collector_was_on = sys.gettrace(), gc.isenabled()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.old_trace)
        # The interrupt may have come to the line that enables it.
        if self.collector_was_on:
            gc.enable()

    def _counts(self, name: str) -> bool:
        # C++ calls the writer, and ends the process for what is raised there.
        return name.startswith(ADAPTC_FOLDERS) and name != safe_torch_save.__file__ and name.endswith(self.files)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if self._counts(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not LEAVES_A_BLOCK.match(getline(frame.f_code.co_filename, frame.f_lineno)):
            self.count += 1
            if self.count == self.stop_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def interrupt_at_every_line(
    action: Callable[[], Any],
    reset: Callable[[], Any],
    observe: Callable[[], Any],
    check_works: Callable[[], Any],
    files: tuple[str, ...],
) -> int:
    """Interrupt a deed at every line of some files: what is ``observe`` afterwards is what was before it, or what is
    after it, and it ``check_works``. ``reset`` makes what was before. How many interrupts came."""
    reset()
    old = observe()
    with LineInterrupt(files=files) as lines:
        action()
    new, interrupt_count = observe(), 0
    for n in range(1, lines.count + 1):
        reset()
        assert observe() == old
        try:
            with LineInterrupt(n, files):
                action()
        except KeyboardInterrupt:
            interrupt_count += 1
        assert observe() in (old, new), f"line {n}"
        check_works()
    return interrupt_count
