"""Run another engine in a process of another environment, which answers a line with a line of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Peer:
    """A process that runs a script of this folder with the interpreter ``python``.

    ``arguments`` are those of the script, which prints "ready" when it waits for lines.
    """

    def __init__(self, python: str, script: str, *arguments: Any) -> None:
        path = Path(__file__).parent / script
        self._script = script
        self._process = subprocess.Popen(
            [python, str(path), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._read(lambda line: line == "ready")

    def _read(self, is_wanted: Callable[[str], bool]) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if is_wanted(line.strip()):
                return line
        raise RuntimeError(f"{self._script} ended: is its engine in that environment?")

    def __call__(self, line: str = "go") -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self._read(lambda line: line.startswith("{")))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
