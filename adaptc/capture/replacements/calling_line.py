"""Tell which line of a model is being run, in code that stands in for torch's functions while it is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

#: where code is that is no model's
NOT_A_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))


def calling_line() -> str:
    """Return the file and line of the code outside of torch and of this package that is being run."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_A_MODEL):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
