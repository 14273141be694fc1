"""The public names: one table, which type checkers see the same of, and whose objects say that they live in adaptc."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adaptc

SOURCE = Path(adaptc.__file__)


def imported_for_checkers(source: Path = SOURCE) -> dict[str, str]:
    """Name -> module, of the imports under TYPE_CHECKING and in stubs beside ``source``; packages of adaptc aside."""
    blocks = [b.body for b in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(b, ast.If)]
    stubs = {f.stem: f for f in source.parent.glob("*.pyi")}
    found: dict[str, str] = {}
    for statement in (s for body in blocks for s in body):
        assert isinstance(statement, ast.ImportFrom)
        assert statement.module is not None
        if stub := stubs.get(statement.module.rpartition(".")[2]):
            inside = [s for s in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(s, ast.ImportFrom)]
            homes = {a.asname or a.name: str(s.module) for s in inside for a in s.names}
            found |= {a.name: homes[a.name] for a in statement.names}
        elif statement.module != "adaptc":
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


def test_no_package_hides_a_public_name() -> None:
    """Importing ``adaptc.verify.compare`` would put the package in the place of the function ``adaptc.verify``."""
    assert [n for n in adaptc.PUBLIC if importlib.util.find_spec(f"adaptc.{n}") is not None] == []


@pytest.mark.long
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
    assert {*adaptc.PUBLIC, *adaptc.NAMESPACES} <= set(dir(adaptc))
    assert set(adaptc.__all__) == {*adaptc.PUBLIC, "__version__"}


NAMESPACES = [importlib.import_module(f"adaptc.{name}") for name in adaptc.NAMESPACES]


@pytest.mark.parametrize("package", NAMESPACES, ids=adaptc.NAMESPACES)
def test_a_namespace_has_what_its_table_says(package: ModuleType) -> None:
    assert getattr(adaptc, package.__name__.removeprefix("adaptc.")) is package
    imported = imported_for_checkers(Path(package.__file__ or ""))
    own = {n: h for n, h in package.PUBLIC.items() if n in imported}
    assert imported == own
    for name, home in package.PUBLIC.items():
        value = getattr(package, name)
        assert (value.__module__, value.__name__) == (package.__name__, name)
        assert inspect.getdoc(value)
        assert pydoc.locate(f"{package.__name__}.{name}") is value
        assert pickle.loads(pickle.dumps(value)) is value
        assert getattr(sys.modules[home], name) is value
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_no_name_is_public_twice() -> None:
    names = [*adaptc.PUBLIC, *(n for package in NAMESPACES for n in package.PUBLIC)]
    assert len({*names}) == len(names)
    assert not {*adaptc.MOVED} & {*adaptc.PUBLIC}


@pytest.mark.parametrize("old", list(adaptc.MOVED))
def test_a_moved_name_works_and_says_once_where_it_is(old: str) -> None:
    vars(adaptc).pop(old, None)
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=rf"adaptc\.{old} is called {re.escape(adaptc.MOVED[old])} now") as said:
        exec(f"from adaptc import {old}", names)
    assert names[old] is getattr(adaptc, old) is pydoc.locate(adaptc.MOVED[old])
    assert len(said) == 1
    assert said[0].filename == "<string>"


def test_the_top_level_is_small() -> None:
    """Configs and errors aside, it has what most people use."""
    rest = [n for n in adaptc.PUBLIC if not n.endswith(("Config", "Error", "Warning"))]
    assert len(rest) <= 36, rest
