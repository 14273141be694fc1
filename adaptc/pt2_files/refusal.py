"""Why a file is refused, told by the place in it where that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_LONGEST = 400  # of a place, in a message


class Refused(Exception):
    """``why`` says what was expected and found. Whoever reads an outer part of the file puts the place before it, with
    :meth:`inside`."""

    def __init__(self, why: str, place: str = "") -> None:
        super().__init__(why)
        self.why, self.place = why, place

    def inside(self, step: str) -> Refused:
        self.place = step + self.place
        return self

    def __str__(self) -> str:
        place = self.place.lstrip(".").replace(", .", ", ").removesuffix(", ")
        if len(place) > _LONGEST:
            place = f"{place[: _LONGEST // 2]} ... {place[-_LONGEST // 2 :]}"
        return f"{place}: {self.why}" if place else self.why


def shown(value: Any, most: int = 60) -> str:
    """A value of a file, short enough for a message and on one line."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason(error: BaseException) -> str:
    """What an exception says, on one line; torch puts whole tracebacks into its messages."""
    text = str(error).strip()[:2000]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def shown_path(path: Path) -> str:
    """A path for a message; what of it is no UTF-8 as escapes, so that the message can be printed."""
    return os.fsencode(path).decode(errors="backslashreplace")
