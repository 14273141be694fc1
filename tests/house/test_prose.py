"""The rules of prose: each is broken on purpose, and found."""

from __future__ import annotations

import pytest

from tests.house.prose import LONGEST, faults, main, sentences

LONG = " ".join(["word"] * (LONGEST + 1))


def in_function(docstring: str) -> str:
    return f'def f():\n    """{docstring}"""\n'


@pytest.mark.parametrize(
    "docstring",
    [
        "What is left of it.",
        "Whether it is so.",
        "``Of`` the rows those that are there.",
        "Those that remain.",
        "The same, with other options.",
        "Where they are.",
        "Of :func:`f` the rest.",
    ],
)
@pytest.mark.parametrize(
    "around", ['"""{}"""', 'class A:\n    """{}"""', 'class A:\n    def f(self):\n        """{}"""']
)
def test_a_docstring_without_a_subject_is_found(docstring: str, around: str) -> None:
    found = list(faults(around.format(docstring), "a.py"))
    assert len(found) == 1
    assert found[0].startswith("a.py:")
    assert "opens with" in found[0]


@pytest.mark.parametrize("docstring", ["The rows that are there.", "A row.", "Every row that is there.", "It is so."])
def test_a_function_begins_with_a_verb(docstring: str) -> None:
    assert len(list(faults(in_function(docstring)))) == 1
    assert not list(faults(f'class A:\n    """{docstring}"""\n'))


def test_long_sentences_are_found() -> None:
    assert len(list(faults(in_function(f"Return it. {LONG}. {LONG}")))) == 2
    assert not list(faults(in_function("Return it. " + LONG.removesuffix(" word") + ".")))
    assert not list(faults(in_function(f"Return it.\n\n        {LONG}\n\n    Done.")))
    assert list(sentences("Return ``a b c`` of x. Raises: E.")) == ["Return x of x.", "Raises:", "E."]


@pytest.mark.parametrize("docstring", ["Return the rows.", "Tell whether it is so.", "Yield what is left."])
def test_good_docstrings_pass(docstring: str) -> None:
    assert not list(faults(in_function(docstring)))


@pytest.mark.parametrize("field", ['a = 1\n"""Of it."""\n', 'class A:\n    a: int\n    """How many."""\n'])
def test_a_string_after_an_assignment_is_found(field: str) -> None:
    assert ["a string after an assignment" in line for line in faults(field)] == [True]
    assert not list(faults('"""Return it."""\n#: how many\na = 1\n'))


@pytest.mark.long
def test_the_source_keeps_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
