"""Read the lines of a chat from stdin, write answers to stdout, and write notes to stderr.

Input is a terminal, a pipe or a file. Ctrl-C during an answer stops the answer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import typer

#: control characters except tab and newline, which an answer could steer the terminal with
_CONTROL_CHARACTERS = {c: None for c in [*range(32), *range(127, 160)] if chr(c) not in "\t\n"}


class Screen:
    """The input and output of a chat; see the module docstring."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # importing it gives arrow keys and history

    def lines(self) -> Iterator[str]:
        """Yield the lines that are typed, without their line ends. Ctrl-C drops a line that was begun."""
        while True:
            try:
                line = input("> ") if self._is_terminal else sys.stdin.readline()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.note("\n/quit or the end of input (ctrl-D) ends the chat")
                continue
            if not self._is_terminal and not line:
                return
            # Bytes that are no text were taken as lone surrogates, which no tokenizer takes.
            yield line.removesuffix("\n").encode("utf-8", "replace").decode()

    def write(self, text: str) -> None:
        """Write the next part of an answer, without control characters."""
        typer.echo(_printable(text.translate(_CONTROL_CHARACTERS)), nl=False)
        sys.stdout.flush()

    def line(self, text: str) -> None:
        """Write a line of a command's result."""
        typer.echo(_printable(text))

    def note(self, text: str) -> None:
        """Write a note about progress to stderr."""
        typer.secho(_printable(text), err=True, dim=True)

    def error(self, text: str) -> None:
        typer.secho(_printable(f"error: {' '.join(text.split())}"), fg="red", err=True)

    @contextlib.contextmanager
    def progress(self, task: str) -> Iterator[None]:
        """Run the block with a note of what it does before it, and of the seconds that it took after it."""
        self.note(f"{task} ...")
        start = time.perf_counter()
        yield
        self.note(f"{task}: {time.perf_counter() - start:.1f} s")

    def streamer(self, tokenizer: Any) -> Any:
        """Return a transformers streamer that writes an answer here."""
        return _streamer_class()(tokenizer, self.write)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _streamer_class() -> type:
    from transformers import TextStreamer

    class ScreenStreamer(TextStreamer):
        def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.write = write

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.write(text)

    return ScreenStreamer


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Callable[[], bool]]:
    """Run the block with a function that returns whether ctrl-C was pressed.

    A second ctrl-C raises KeyboardInterrupt, for code that does not call the function. Outside the main thread the
    function always returns False.
    """
    pressed: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        usual = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Run the block with transformers' messages below errors off, and without its progress bars where stderr is no
    terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def configure_environment() -> None:
    """Set the environment so that nothing is downloaded, and no progress bars appear where stderr is no terminal.

    Call it before torch and transformers are imported, because they read the environment then.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
