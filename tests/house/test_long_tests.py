"""The list of tests that take long names tests that exist, and is as short as its budget allows."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.long_tests import choose_long_tests, function, is_long, read_long_tests, times_of

ROOT = Path(__file__).parents[2]


def functions(path: Path) -> set[str]:
    """The test functions of a file, and what it takes from others."""
    out: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
            out.add(node.name)
        elif isinstance(node, ast.FunctionDef):
            out.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            out |= {a.asname or a.name for a in node.names}
    return out


def test_every_name_is_of_a_test() -> None:
    assert read_long_tests()
    for name in read_long_tests():
        file, _, rest = name.partition("::")
        assert (ROOT / file).is_file(), name
        found = functions(ROOT / file)
        assert rest in found or rest.partition("::")[0] in found, name  # made by a library, of a class of this name


def test_parameters_do_not_matter() -> None:
    name = sorted(read_long_tests())[0]
    assert is_long(name)
    assert is_long(f"{name}[1-a[b]]")
    assert not is_long(f"{name}_too")


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
