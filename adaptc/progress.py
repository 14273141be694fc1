"""Report the progress of long work: log lines on the logger ``adaptc``, and a status line on a terminal.

:func:`stage` logs the beginning and the end of its work at level INFO. Meanwhile a terminal shows the innermost stage,
with its count where it has one; afterwards the line is erased. A thread of its own draws the line, from :data:`DELAY`
seconds on, and a process has only one line. There is none where stderr is no terminal, and none at levels above
WARNING. Nor is there one where the environment turns progress bars off, or while rich has a live display.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from adaptc.errors import AdaptcWarning, ConfigError, short_repr
from adaptc.locks import reset_after_fork
from adaptc.tables import format_bytes

T = TypeVar("T")

VERBOSITY_VARIABLE = "ADAPTC_VERBOSITY"
#: the names of levels, as transformers has them
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
#: environment variables that turn off the progress bars of tqdm and of Hugging Face's libraries
SILENCING_VARIABLES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
#: seconds before a status line is shown, and between two of its updates
DELAY, REFRESH_SECONDS = 1.0, 0.125

LOGGER = logging.getLogger("adaptc")


def get_verbosity() -> int:
    """Return the level of adaptc's logger.

    Returns:
        one of the levels of ``logging``, such as ``logging.WARNING``.

    Example:
        >>> adaptc.get_verbosity()
        30
    """
    return LOGGER.getEffectiveLevel()


def set_verbosity(level: int | str) -> None:
    """Set the level of adaptc's logger, as ``transformers.logging.set_verbosity`` does.

    At "info" each stage of long work has a line when it begins and when it ends. At "warning", the default, a terminal
    shows a status line while work takes long. At "error" and "critical" it shows none. The environment variable
    ``ADAPTC_VERBOSITY`` sets the first level.

    Args:
        level: a level of ``logging``, or "debug", "info", "warning", "error" or "critical".

    Raises:
        ConfigError: ``level`` is none of these.

    Example:
        >>> adaptc.set_verbosity("error")
        >>> adaptc.set_verbosity("warning")
    """
    LOGGER.setLevel(_level(level))


def _level(value: Any) -> int:
    if isinstance(value, str) and value.lower() in LEVELS:
        return LEVELS[value.lower()]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(
        f"verbosity {short_repr(value)} is no level: give one of {', '.join(map(repr, LEVELS))}, or a level of "
        "logging, such as logging.INFO"
    )


class _Handler(logging.Handler):
    """A handler that writes to stderr only where no other handler gets the record.

    So a user who configures logging sees each line once, in the place of their choice.
    """

    def emit(self, record: logging.LogRecord) -> None:
        others = [*LOGGER.handlers, *(logging.getLogger().handlers if LOGGER.propagate else ())]
        if sys.stderr is None or any(h is not self for h in others):
            return
        try:
            # sys.stderr is read at each call, since a status line replaces it by an object that gives way.
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _configure() -> None:
    """Give the logger its handler, and the level of the environment where no level is set."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("[adaptc] %(message)s"))
    LOGGER.addHandler(handler)
    if LOGGER.level != logging.NOTSET:
        return
    wanted = os.environ.get(VERBOSITY_VARIABLE) or "warning"
    LOGGER.setLevel(LEVELS.get(wanted.lower(), logging.WARNING))
    if wanted.lower() not in LEVELS:
        warnings.warn(
            f"{VERBOSITY_VARIABLE}={short_repr(wanted)} in the environment is no level: set it to one of "
            f"{', '.join(LEVELS)}",
            AdaptcWarning,
            stacklevel=2,
        )


class Stage:
    """A context manager for a stage of long work, made by :func:`stage`; it can be entered once."""

    def __init__(self, text: str, always: bool) -> None:
        self.text, self.always = text, always
        self.start_time, self.done, self.total = 0.0, 0, 0
        #: whether ``done`` and ``total`` are bytes
        self.is_bytes = False

    def __enter__(self) -> Self:
        LOGGER.info("%s", self.text)
        self.start_time = time.perf_counter()
        _line.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _line.end(self)
        outcome = "done in" if kind is None else "failed after" if issubclass(kind, Exception) else "stopped after"
        LOGGER.info("%s: %s %.1f s", self.text, outcome, time.perf_counter() - self.start_time)

    def track(self, items: Collection[T]) -> Iterator[T]:
        """Iterate over ``items``, and let the status line count them."""
        # The stage shows the count and ends by itself, so an iterator that an error leaves behind keeps no status line.
        self.done, self.total, self.is_bytes = 0, len(items), False
        for item in items:
            yield item
            self.done += 1

    def count_bytes(self, total: int) -> Callable[[int], None]:
        """Let the status line count bytes up to ``total``, and tell the time left. Return what adds to the count."""
        self.done, self.total, self.is_bytes = 0, total, True

        def add(nbytes: int) -> None:
            self.done += nbytes

        return add

    def describe_count(self) -> str:
        """Return the count as text, with the time left for bytes, by the mean rate so far."""
        if not self.is_bytes:
            return f"{self.done} of {self.total}"
        text = f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        if not 0 < self.done < self.total:
            return text
        elapsed = time.perf_counter() - self.start_time
        return f"{text}, {_minutes(elapsed * (self.total - self.done) / self.done)} left"


def _minutes(seconds: float) -> str:
    """Return seconds as minutes and seconds: ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def stage(text: str, *, always: bool = False) -> Stage:
    """Return a context manager for work that may take long.

    ``text``: what is done, and to what, such as ``capturing LlamaForCausalLM``. ``always``: a terminal shows it at
    once, at any level.
    """
    return Stage(text, always)


class _StderrGuard:
    """A replacement for stderr while there is a status line: it erases the line before other code writes.

    rich's own replacement is not used, since at its end it restores the stderr of its beginning. In another thread that
    may have been the string of a ``redirect_stderr``. This one passes on text that is written to it after its end.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.is_active = stream, True
        self._lock = reset_after_fork(threading.RLock())
        #: whether the status line is drawn, and whether other code has written a line without its end
        self._is_drawn = self._is_mid_line = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.is_active:
            return self.stream.write(text)
        with self._lock:
            self._erase()
            self._is_mid_line = not text.endswith("\n") if text else self._is_mid_line
            return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def draw(self, line: str) -> None:
        """Show ``line`` in the place of the last one, unless other code has written a line without its end."""
        with self._lock:
            if not self._is_mid_line:
                self._erase()
                self._is_drawn = True
                self.stream.write(line)
                self.stream.flush()

    def end(self) -> None:
        """Erase the status line for good."""
        with self._lock:
            self.is_active = False
            self._erase()
            self.stream.flush()

    def _erase(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            self.stream.write("\r\x1b[2K")


class _StatusLine:
    """The one status line of the process, and the open stages of all threads."""

    def __init__(self) -> None:
        self._lock = reset_after_fork(threading.RLock())
        self._open_stages: list[Stage] = []
        #: the thread that draws the line, the event that ends it, and the replacement of stderr; None without a line
        self._drawing: tuple[threading.Thread, threading.Event, _StderrGuard] | None = None

    def begin(self, opened: Stage) -> None:
        with self._lock:
            self._open_stages.append(opened)
            if self._drawing is None and can_show_status(opened.always):
                with suppress(Exception):  # a broken terminal, or a lack of threads, must not make the work fail
                    self._drawing = self._start_drawing(opened.always)

    def end(self, closed: Stage) -> None:
        with self._lock:
            if closed in self._open_stages:  # a process that was forked inside the stage has forgotten it
                self._open_stages.remove(closed)
            if self._open_stages or self._drawing is None:
                return
            (thread, ended, _), self._drawing = self._drawing, None
        ended.set()
        if thread is not threading.current_thread():  # a garbage collection in that thread may end a stage
            thread.join()

    def reset_after_fork(self) -> None:
        """Start afresh in a forked process, which lacks the thread that draws the line."""
        old_drawing = self._drawing
        self.__init__()
        if old_drawing is not None:
            _restore_stderr(old_drawing[2])

    def _start_drawing(self, always: bool) -> tuple[threading.Thread, threading.Event, _StderrGuard]:
        from rich.console import Console

        if isinstance(sys.stderr, _StderrGuard):  # a redirect_stderr restored it after the last line had ended
            _restore_stderr(sys.stderr)
        guard, ended = _StderrGuard(sys.stderr), threading.Event()
        args = (guard, Console(file=guard.stream), ended, always)
        thread = threading.Thread(target=self._draw_until_ended, args=args, name="adaptc-status", daemon=True)
        thread.start()
        return thread, ended, guard

    def _draw_until_ended(self, guard: _StderrGuard, console: Any, ended: threading.Event, always: bool) -> None:
        """Draw the line until ``ended`` is set.

        It runs in a thread of its own, which a keyboard interrupt never reaches, so the line is always erased.
        """
        from rich.spinner import Spinner

        if not always and ended.wait(DELAY):
            return
        if (
            sys.stderr is not guard.stream
            or not can_show_status(always)
            or console.is_dumb_terminal
            or console.legacy_windows
        ):
            return
        spinner = Spinner("dots" if console.encoding.startswith("utf") else "line")
        with suppress(Exception):  # the terminal may be gone
            sys.stderr = guard  # type: ignore[assignment]
            try:
                guard.draw(self._render_line(console, spinner))
                while not ended.wait(REFRESH_SECONDS):
                    guard.draw(self._render_line(console, spinner))
            finally:
                try:
                    guard.end()
                finally:
                    _restore_stderr(guard)

    def _render_line(self, console: Any, spinner: Any) -> str:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for innermost in self._open_stages[
            -1:
        ]:  # a slice, since other threads may empty the list between a test and an index
            cells = [spinner, Text(innermost.text, no_wrap=True, overflow="crop")]
            if innermost.total:
                cells += [
                    ProgressBar(innermost.total, innermost.done, width=20),
                    Text(innermost.describe_count(), no_wrap=True),
                ]
            seconds = time.perf_counter() - innermost.start_time
            grid.add_row(*cells, Text(_minutes(seconds), no_wrap=True))
        with console.capture() as captured:
            console.print(grid, width=max(1, console.width - 1))  # on a full line, a terminal wraps to the next one
        return captured.get().partition("\n")[0]


def _restore_stderr(guard: _StderrGuard) -> None:
    """Restore stderr, unless other code has replaced it since."""
    guard.is_active = False
    if sys.stderr is guard:
        sys.stderr = guard.stream


def can_show_status(always: bool = False) -> bool:
    """Return whether stderr is a terminal that takes a status. ``always``: whatever the level of the logger is."""
    if not (always or LOGGER.isEnabledFor(logging.WARNING)) or any(map(_is_on, SILENCING_VARIABLES)):
        return False
    if any(map(_is_proxy, (sys.stdout, sys.stderr))):  # rich has a live display, which the line would overwrite
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "on", "yes", "true")


def _is_proxy(stream: Any) -> bool:
    """Return whether ``stream`` is rich's replacement for a stream during a live display, without importing rich."""
    return type(stream).__module__ == "rich.file_proxy"


_line = _StatusLine()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_line.reset_after_fork)
_configure()
