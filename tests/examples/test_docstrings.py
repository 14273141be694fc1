"""The examples in the docstrings of public names: every one runs, and prints what it says."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.house.public import PACKAGES, SETUP, SETUP_LANGUAGE_MODEL, SETUP_METHOD, source

#: names whose examples compile machine code, or try a method at every kind of layer
SLOW = {"adaptc.package", "adaptc.load_package", "adaptc.PackagedProgram", "adaptc.methods.check_method"}
#: words of an example -> further lines that it starts with
FURTHER = {"lm": SETUP_LANGUAGE_MODEL, "ids": SETUP_LANGUAGE_MODEL, "gen": SETUP_LANGUAGE_MODEL, "Shift": SETUP_METHOD}


def examples() -> dict[str, str]:
    """Return path -> docstring of every public name whose docstring has an example."""
    names = [public for package in PACKAGES for public in source().names(package)]
    found = {public.path: ast.get_docstring(public.node) or "" for public in names}
    return {path: text for path, text in found.items() if ">>>" in text}


EXAMPLES = examples()


@pytest.mark.long
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else [], id=p) for p in EXAMPLES]
)
def test_the_example_of_a_docstring_runs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "__main__"}
    text = EXAMPLES[path]
    for lines in dict.fromkeys([SETUP, *(code for word, code in FURTHER.items() if word in text)]):
        exec(lines, space)
    test = doctest.DocTestParser().get_doctest(text, space, path, None, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
