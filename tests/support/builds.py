"""What is built while a test runs: the code of programs and of rows, and the graphs that calls run."""

from __future__ import annotations

from typing import Any

import pytest

from adaptc.runtime.executor import Executor
from adaptc.runtime.variants.graph_variants import GraphVariants


def record_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry for each, as it is built."""
    built: list[str] = []
    for owner, name in ((Executor, "__init__"), (GraphVariants, "_make_variant")):
        monkeypatch.setattr(owner, name, _recording(getattr(owner, name), built))
    return built


def _recording(original: Any, out: list[str]) -> Any:
    def build(*args: Any, **kwargs: Any) -> Any:
        out.append(original.__qualname__)
        return original(*args, **kwargs)

    return build
