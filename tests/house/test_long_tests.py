"""Tests that take long are marked where they are written, as few as the budget allows."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.long_tests import (
    MARKER,
    ROOT,
    choose_long_tests,
    function,
    functions_in,
    times_of,
    with_markers,
    write_markers,
)

PLAIN = '''"""Some tests."""

from __future__ import annotations

from pathlib import Path


def test_a() -> None: ...


@given(1)
def test_b() -> None: ...


class TestC:
    def test_d(self) -> None: ...
'''


def test_markers_are_written_and_taken_away() -> None:
    marked = with_markers(PLAIN, ["test_b", "TestC::test_d"])
    assert f"{MARKER}\n@given(1)\ndef test_b" in marked
    assert f"    {MARKER}\n    def test_d" in marked
    assert marked.count(MARKER) == 2
    assert "\nimport pytest\n" in marked
    assert with_markers(marked, ["test_b", "TestC::test_d"]) == marked
    assert with_markers(marked, []).replace("import pytest\n", "") == PLAIN


def test_what_has_no_function_is_told(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_x.py"
    file.write_text(PLAIN)
    names = ["tests/test_x.py::test_a", "tests/test_x.py::TestMade::runTest", "tests/test_gone.py::test_a"]
    assert write_markers(names, tmp_path) == ["tests/test_gone.py::test_a", "tests/test_x.py::TestMade::runTest"]
    assert f"{MARKER}\ndef test_a" in file.read_text()


def test_there_are_long_tests() -> None:
    files = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    assert sum(text.count(f"{MARKER}\n") for text in files) > 100
    assert {name for name, _ in functions_in(PLAIN)} == {"test_a", "test_b", "TestC::test_d"}


@given(
    st.dictionaries(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), st.floats(0, 9), min_size=1),
    st.floats(0, 60),
)
def test_the_longest_are_chosen(drawn: dict[tuple[str, int], float], budget: float) -> None:
    seconds = {f"t.py::test_{name}[{i}]": s for (name, i), s in drawn.items()}
    found = choose_long_tests(seconds, budget)

    def mean(name: str) -> float:
        own = [s for n, s in seconds.items() if function(n) == name]
        return sum(own) / len(own)

    rest = {n: s for n, s in seconds.items() if function(n) not in found}
    assert sum(rest.values()) <= budget + 1e-6 or not rest
    assert min(map(mean, found), default=9.0) >= max((mean(function(n)) for n in rest), default=0.0)
    if found:  # one less is too few
        shortest = max(found, key=lambda n: (-mean(n), n))  # the last of them
        back = sum(s for n, s in seconds.items() if function(n) == shortest)
        assert sum(rest.values()) + back > budget - 1e-6


def test_times_are_read_from_what_pytest_writes(tmp_path: Path) -> None:
    file = tmp_path / "times.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="tests.a.test_b" name="test_c[1.5-x]" time="2.5"/>'
        '<testcase classname="tests.a.test_b.TestD" name="runTest" time="0.5"/></testsuite></testsuites>'
    )
    assert times_of([file]) == {"tests/a/test_b.py::test_c[1.5-x]": 2.5, "tests/a/test_b.py::TestD::runTest": 0.5}
