"""What is built while a test runs: the code of programs and of rows, and the graphs that calls run."""

from __future__ import annotations

from typing import Any

import pytest

from adaptc.runtime.executor import Executor
from adaptc.runtime.variants import GraphVariants


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry for each, as it is built."""
    out: list[str] = []
    for owner, name in ((Executor, "__init__"), (GraphVariants, "_make")):
        monkeypatch.setattr(owner, name, _noting(getattr(owner, name), out))
    return out


def _noting(plain: Any, out: list[str]) -> Any:
    def build(*args: Any, **kwargs: Any) -> Any:
        out.append(plain.__qualname__)
        return plain(*args, **kwargs)

    return build
