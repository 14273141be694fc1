"""Which tests take long: a list of functions that was measured, and how it is measured anew.

``make test`` leaves them out, so that it stays a matter of minutes, and ``make test-long`` runs them; ``--full`` runs
all. The list is of test functions, with all their combinations of parameters, whose tests take most time each, as few
as leave the others within :data:`BUDGET_SECONDS`. Anew, after tests have become more or faster:

    make test PYTEST_ARGS=--junitxml=build/short.xml
    make test-long PYTEST_ARGS=--junitxml=build/long.xml
    python -m tests.support.long_tests build/short.xml build/long.xml
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

#: a name on each line: file::function, or file::Class::function
LIST = Path(__file__).with_name("long_tests.txt")
#: seconds of all tests together that are not long: six minutes with two processes, and two for what surrounds them
BUDGET = 700.0


def function(nodeid: str) -> str:
    """The test function of an item."""
    return nodeid.partition("[")[0]


@cache
def read_long_tests() -> frozenset[str]:
    """The functions that take long."""
    return frozenset(LIST.read_text().split())


def is_long(nodeid: str) -> bool:
    return function(nodeid) in read_long_tests()


def choose_long_tests(seconds: Mapping[str, float], budget: float = BUDGET) -> list[str]:
    """Of tests and their times the functions that take most for each test, until the others are within ``budget``."""
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
    """Item -> seconds, from JUnit files that pytest wrote."""
    found: dict[str, float] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            module, name = case.attrib["classname"].split("."), case.attrib["name"]
            classes = [part for part in module if part[:1].isupper()]
            path = "/".join(module[: len(module) - len(classes)]) + ".py"
            found["::".join([path, *classes, name])] = float(case.attrib["time"])
    return found


if __name__ == "__main__":
    names = choose_long_tests(times_of(map(Path, sys.argv[1:])))
    LIST.write_text("".join(f"{name}\n" for name in names))
    print(f"{len(names)} functions take long, of which {LIST} has the names")
