"""The public names: one table, which type checkers see the same of, and whose objects say that they live in adaptc."""

from __future__ import annotations

import ast
import inspect
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import adaptc

SOURCE = Path(adaptc.__file__)


def imported_for_checkers() -> dict[str, str]:
    """Name -> module, of the imports under TYPE_CHECKING."""
    found: dict[str, str] = {}
    for block in ast.parse(SOURCE.read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If):
            for statement in block.body:
                assert isinstance(statement, ast.ImportFrom)
                assert statement.module is not None
                found |= {a.asname or a.name: statement.module for a in statement.names}
    return found


def test_type_checkers_see_what_the_table_says() -> None:
    assert imported_for_checkers() == adaptc.PUBLIC


@pytest.mark.parametrize("name", list(adaptc.PUBLIC))
def test_a_public_name_lives_in_adaptc(name: str) -> None:
    value = getattr(adaptc, name)
    assert value.__module__ == "adaptc"
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert pydoc.locate(f"adaptc.{name}") is value
    assert pickle.loads(pickle.dumps(value)) is value
    assert getattr(sys.modules[adaptc.PUBLIC[name]], name) is value


def test_however_a_class_is_reached_first_it_says_so() -> None:
    """Not only after somebody has asked for ``adaptc.LoraConfig``: configs are also made by name, from files."""
    code = (
        "from adaptc.methods import config_class\n"
        "for kind in ('LORA', 'OFT', 'IA3'):\n"
        "    assert config_class(kind).__module__ == 'adaptc', kind\n"
        "import adaptc.errors, adaptc\n"
        "assert adaptc.ConfigError.__module__ == 'adaptc'\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'adaptc' has no attribute 'compilee'"):
        adaptc.compilee  # noqa: B018
    assert set(adaptc.PUBLIC) <= set(dir(adaptc))
    assert set(adaptc.__all__) == {*adaptc.PUBLIC, "__version__"}
