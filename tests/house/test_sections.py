"""The sections of public docstrings: each is left out on purpose, and missed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.docstring_parts import entries, sections
from tests.house.public import Function, Source
from tests.house.sections import faults, function_faults, main

GOOD = '''
def stretch(rows, *, by: float = 2.0, **options) -> int:
    """Stretch the rows.

    Args:
        rows: the rows, (rows, columns).
        by: the factor, which
            is above zero.
        **options: further options.

    Returns:
        how many there are.

    Raises:
        ValueError: the factor is zero.

    Example:
        >>> stretch([1])
        1
    """
    if not by:
        raise ValueError
    return len(rows)
'''


def found_in(text: str) -> list[str]:
    (node,) = ast.parse(text).body
    assert isinstance(node, Function)
    return list(function_faults(node, "f", example=True))


def test_a_docstring_with_all_sections_passes() -> None:
    assert found_in(GOOD) == []
    assert list(entries(sections(ast.get_docstring(ast.parse(GOOD).body[0]) or "")["Args"])) == [  # type: ignore[arg-type]
        "rows",
        "by",
        "options",
    ]


LEFT_OUT = {
    "rows: the rows, (rows, columns).\n        ": "does not describe rows",
    "**options: further options.": "does not describe options",
    "the rows, (rows, columns).": "does not describe rows",
    "    Returns:\n        how many there are.\n": "no section Returns:",
    "    Raises:\n        ValueError: the factor is zero.\n": "no section Raises:",
    "        >>> stretch([1])\n        1\n": "no section Example:",
}


@pytest.mark.parametrize("part", list(LEFT_OUT))
def test_what_is_left_out_is_missed(part: str) -> None:
    assert part in GOOD
    (fault,) = found_in(GOOD.replace(part, ""))
    assert LEFT_OUT[part] in fault


def test_a_parameter_that_is_gone_is_found() -> None:
    assert "describes by, which is no parameter" in found_in(GOOD.replace("*, by: float = 2.0, ", ""))[0]


def test_functions_of_a_class_may_share_their_arguments() -> None:
    (node,) = ast.parse('def f(self, op) -> int:\n    """Return it."""\n').body
    assert isinstance(node, Function)
    assert len(list(function_faults(node, "f", example=False))) == 2
    assert not list(function_faults(node, "f", example=False, shared={"op": "the op"}))


MODULE = '''
PUBLIC = {{"Box": "{package}"}}


class Box:
    """A box.

    Example:
        >>> Box()
    """
'''


@pytest.fixture
def code(tmp_path: Path) -> Source:
    """A project in which every package has one class."""
    for package in (
        "adaptc",
        "adaptc.training",
        "adaptc.distributed",
        "adaptc.prefixes",
        "adaptc.engines",
        "adaptc.exporters",
        "adaptc.methods",
        "adaptc.debug",
    ):
        folder = tmp_path.joinpath(*package.split("."))
        folder.mkdir()
        (folder / "__init__.py").write_text(MODULE.format(package=package), encoding="utf-8")
    return Source(tmp_path)


def test_a_class_needs_a_docstring_an_example_and_its_attributes(code: Source) -> None:
    assert not list(faults(code))
    home = code.file("adaptc")
    text = home.read_text(encoding="utf-8")
    planted = {
        text.replace('"""A box.', '"""').replace("Example:", "").replace(">>> Box()", ""): "no docstring",
        text.replace(">>> Box()", "Box()"): "no section Example:",
        text.replace("class Box", "@dataclass\nclass Box") + "    size: int\n": "Attributes: does not describe size",
        text + "    def __init__(self, size): ...\n": "Args: does not describe size",
    }
    for changed, fault in planted.items():
        home.write_text(changed, encoding="utf-8")
        (line,) = faults(Source(code.root))
        assert line.startswith("adaptc/__init__.py:")
        assert fault in line


def test_public_names_keep_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
