"""A process on a terminal: what it writes there, and what is seen of it in the end.

Before: Python code. After: it has run in a process of its own whose stderr is a terminal. ``render_screen`` plays what
a terminal does with the few control sequences that a status line is made of.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

_SEQUENCE = re.compile(r"\x1b\[\??(\d*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


@dataclass(frozen=True)
class TerminalRun:
    """``terminal_text``: all that was written to the terminal; ``out``: what went to stdout, which is a pipe."""

    code: int
    terminal_text: str
    out: str

    @property
    def screen(self) -> list[str]:
        return render_screen(self.terminal_text)


def on_terminal(code: str, **environment: str) -> TerminalRun:
    """Run ``code`` with a terminal as stderr, where no variable turns off progress but those of ``environment``."""
    pty = pytest.importorskip("pty")  # not on Windows
    off = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "ADAPTC_VERBOSITY", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
    env = {n: v for n, v in os.environ.items() if n not in off} | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, env=env | environment, text=True
    ) as process:
        os.close(terminal)
        data = b""
        while piece := _read(controller):
            data += piece
        out, _ = process.communicate()
    os.close(controller)
    return TerminalRun(process.returncode, data.decode(), out)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # what Linux says at the end
        return b""


def render_screen(text: str) -> list[str]:
    """The lines that a screen has in the end, without empty ones at the end. Raises ValueError for sequences that are
    none of these."""
    lines, row, column = [""], 0, 0
    for number, command, control, plain in _SEQUENCE.findall(text):
        if plain:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + plain + line[column + len(plain) :]
            column += len(plain)
        elif control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K" and number == "2":
            lines[row] = ""
        elif command not in "mhl":
            raise ValueError(f"the sequence {number}{command} is not known")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
