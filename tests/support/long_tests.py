"""Mark the tests that take long, by the times that were measured.

``make test`` leaves out tests with the marker ``long``, so that it stays a matter of minutes, and ``make test-long``
runs them; ``--full`` runs all. The marker stands at a test function, with all its combinations of parameters. Marked
are those whose tests take most time each, as few as leave the others within :data:`BUDGET`. To measure anew, after
tests have become more or faster:

    make test PYTEST_ARGS=--junitxml=build/short.xml
    make test-long PYTEST_ARGS=--junitxml=build/long.xml
    python -m tests.support.long_tests build/short.xml build/long.xml
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
MARKER = "@pytest.mark.long"
#: seconds of all tests together that are not long: seven minutes with two processes, and one for what surrounds them
BUDGET = 840.0


def function(nodeid: str) -> str:
    """Return the test function of an item."""
    return nodeid.partition("[")[0]


def choose_long_tests(seconds: Mapping[str, float], budget: float = BUDGET) -> list[str]:
    """Return the functions that take most for each test, as few as leave the others within ``budget``.

    ``seconds`` has the time of each test.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for nodeid, took in seconds.items():
        times[function(nodeid)].append(took)
    total, out = sum(seconds.values()), []
    for name in sorted(times, key=lambda n: (-sum(times[n]) / len(times[n]), n)):
        if total <= budget:
            break
        total -= sum(times[name])
        out.append(name)
    return sorted(out)


def times_of(files: Iterable[Path]) -> dict[str, float]:
    """Return item -> seconds, from JUnit files that pytest wrote."""
    found: dict[str, float] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            module, name = case.attrib["classname"].split("."), case.attrib["name"]
            classes = [part for part in module if part[:1].isupper()]
            path = "/".join(module[: len(module) - len(classes)]) + ".py"
            found["::".join([path, *classes, name])] = float(case.attrib["time"])
    return found


def functions_in(text: str) -> Iterator[tuple[str, int]]:
    """Yield each function of a file by name, those of classes as Class::function, with its first line, from 1."""
    for node in ast.parse(text).body:
        for item in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(item, ast.FunctionDef):
                prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
                yield prefix + item.name, min([item.lineno, *(d.lineno for d in item.decorator_list)])


def with_markers(text: str, names: Iterable[str]) -> str:
    """Return the source of a test file with markers at the functions ``names`` and at no others."""
    text = re.sub(rf"(?m)^[ \t]*{re.escape(MARKER)}\n", "", text)
    lines, wanted = text.split("\n"), {*names}
    for name, first in sorted(functions_in(text), key=lambda x: -x[1]):
        if name in wanted:
            indent = " " * (len(lines[first - 1]) - len(lines[first - 1].lstrip()))
            lines.insert(first - 1, indent + MARKER)
    text = "\n".join(lines)
    if MARKER in text and not re.search(r"(?m)^import pytest$", text):
        imports = [n for n in ast.parse(text).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        first = next(n.lineno for n in imports if getattr(n, "module", "") != "__future__")
        lines = text.split("\n")
        text = "\n".join([*lines[: first - 1], "import pytest", *lines[first - 1 :]])
    return text


def write_markers(names: Iterable[str], root: Path = ROOT) -> list[str]:
    """Write the markers into the files below ``root``/tests; return the names that are of no function in a file."""
    by_file: dict[str, set[str]] = defaultdict(set)
    for name in names:
        file, _, rest = name.partition("::")
        by_file[file].add(rest)
    for path in sorted((root / "tests").rglob("test_*.py")):
        file, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        own = by_file.pop(file, set())
        if (new := with_markers(text, own)) != text:
            path.write_text(new, encoding="utf-8")
        if left := own - {name for name, _ in functions_in(text)}:
            by_file[file] = left
    return sorted(f"{file}::{name}" for file, rest in by_file.items() for name in rest)


if __name__ == "__main__":
    chosen = choose_long_tests(times_of(map(Path, sys.argv[1:])))
    for name in write_markers(chosen):
        print(f"{name} is made by a library: mark its class by hand, pytest.mark.long(...)")
    print(f"{len(chosen)} functions take long; `make format` sorts the imports")
