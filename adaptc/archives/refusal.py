"""Define the error for refused files, which tells the reason and the place in the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptc.errors import CheckpointError

_MAX_LOCATION = 400  # the most characters of a place in a message


class UnsafeFile(Exception):
    """An error on a part of a file. ``problem`` says what was expected and what was found.

    Code that reads an outer part of the file prepends its place with :meth:`prepend_location`.
    """

    def __init__(self, problem: str, location: str = "") -> None:
        super().__init__(problem)
        self.problem, self.location = problem, location

    def prepend_location(self, outer: str) -> UnsafeFile:
        self.location = outer + self.location
        return self

    def __str__(self) -> str:
        place = self.location.lstrip(".").replace(", .", ", ").removesuffix(", ")
        if len(place) > _MAX_LOCATION:
            place = f"{place[: _MAX_LOCATION // 2]} ... {place[-_MAX_LOCATION // 2 :]}"
        return f"{place}: {self.problem}" if place else self.problem


def short_repr(value: Any, max_length: int = 60) -> str:
    """Return a value of a file as text for a message: short, and on one line."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[: max_length + 1] if isinstance(value, str) else value)
    return text if len(text) <= max_length else f"{text[:max_length]}..."


def describe_error(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, since torch puts whole tracebacks into its
    messages."""
    text = str(error).strip()[:2000]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def printable_path(path: Path) -> str:
    """Return a path for a message, with escapes for bytes that are not UTF-8, so that the message can be printed."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def raises_checkpoint_error(path: Path) -> Iterator[None]:
    """Run the block, which reads a program, and turn any error of it into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"there is no file {printable_path(path)}") from error
    except Exception as error:  # what torch raises on a forged graph can be anything
        why = str(error) if isinstance(error, UnsafeFile) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)} cannot be read as an exported program: {why}. Save or download it again"
        ) from error
