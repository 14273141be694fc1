"""Define the error for refused files, which tells the reason and the place in the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_LONGEST = 400  # the most characters of a place in a message


class UnsafeFile(Exception):
    """An error on a part of a file. ``why`` says what was expected and what was found.

    Code that reads an outer part of the file prepends its place with :meth:`inside`.
    """

    def __init__(self, why: str, place: str = "") -> None:
        super().__init__(why)
        self.why, self.place = why, place

    def inside(self, step: str) -> UnsafeFile:
        self.place = step + self.place
        return self

    def __str__(self) -> str:
        place = self.place.lstrip(".").replace(", .", ", ").removesuffix(", ")
        if len(place) > _LONGEST:
            place = f"{place[: _LONGEST // 2]} ... {place[-_LONGEST // 2 :]}"
        return f"{place}: {self.why}" if place else self.why


def shown(value: Any, most: int = 60) -> str:
    """Return a value of a file as text for a message: short, and on one line."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, since torch puts whole tracebacks into its
    messages."""
    text = str(error).strip()[:2000]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def shown_path(path: Path) -> str:
    """Return a path for a message, with escapes for bytes that are not UTF-8, so that the message can be printed."""
    return os.fsencode(path).decode(errors="backslashreplace")
