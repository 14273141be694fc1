"""Which tests run when not all of them do: a cover of the products, and no slow lanes.

A test with parameters runs for every value of each of them, and, where it has several, for every pair of values of two:
most faults show by a value or by a pair. A test marked ``few(n)`` runs for n of its combinations, first those that show
new values: another choice in each file, so that all values of what many tests share (families of models) are met by
some. So do tests marked ``long`` that say nothing else, for one. ``pytest --full`` runs the whole product, and tests
marked ``slow``. ``pytest --part 1/2`` runs the tests of every second file, and ``--part 2/2`` those of the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any, Protocol

from hypothesis import settings


class Item(Protocol):
    """What is needed of a pytest item."""

    nodeid: str

    def get_closest_marker(self, name: str) -> Any: ...


Axes = dict[str, Hashable]
#: for how many combinations a test marked ``long`` runs
LONG_COMBINATIONS = 1
#: how many examples most properties get with ``--full``
EXAMPLES = 20


def cover(items: Sequence[Any]) -> list[bool]:
    """For each item whether it is part of the cover."""
    tests: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        tests.setdefault(item.nodeid.partition("[")[0], []).append(i)
    chosen = {i for places in tests.values() for i in _choose_indices(items, places)}
    return [i in chosen for i in range(len(items))]


def part(items: Sequence[Item], which: int, parts: int) -> list[bool]:
    """Return for each item whether its file is in part ``which``, from 1, of ``parts``.

    The files are dealt out in the order of their names. Tests of one file share what is built for it, so a file is
    never divided.
    """
    files = sorted({_file(item) for item in items})
    chosen = {*files[which - 1 :: parts]}
    return [_file(item) in chosen for item in items]


def parse_part(text: str) -> tuple[int, int]:
    """Return the two numbers of ``--part K/N``; raise ValueError where there is no such part."""
    which, _, parts = text.partition("/")
    if not (which.isdecimal() and parts.isdecimal() and 1 <= int(which) <= int(parts)):
        raise ValueError(f"--part takes K/N with 1 <= K <= N, such as 1/2, and got {text!r}")
    return int(which), int(parts)


def _file(item: Item) -> str:
    return item.nodeid.partition("::")[0]


def _choose_indices(items: Sequence[Any], indices: list[int]) -> list[int]:
    """Of the places of one test's items those that run."""
    first = items[indices[0]]
    few = first.get_closest_marker("few")
    most = few.args[0] if few else LONG_COMBINATIONS if first.get_closest_marker("long") else None
    # By the file and the parameters: tests of one file, which may share what is built for a parameter, choose alike.
    home = _file(first)
    order = sorted(indices, key=lambda i: zlib.crc32((home + items[i].nodeid.partition("[")[2]).encode()))
    picked = pairwise({i: axes_of(items[i]) for i in order if items[i].get_closest_marker("slow") is None})
    return picked[:most]


def axes_of(item: Any) -> Axes:
    """Parameter -> value of an item; objects are told apart by who they are."""
    call = getattr(item, "callspec", None)
    if call is None:
        return {}
    return {n: v if isinstance(v, (str, int, float)) else ("#", id(v)) for n, v in call.params.items()}


def pairwise(points: dict[int, Axes]) -> list[int]:
    """Points that together have every pair of values of two axes that any point has (every value, where there is one
    axis). Those that show most values not seen before come first, then those that show most pairs."""
    picked = _choose_greedily({i: set(axes.items()) or {None} for i, axes in points.items()}, [])
    return _choose_greedily(
        {i: set(combinations(sorted(axes.items(), key=_axis_name), 2)) for i, axes in points.items()}, picked
    )


def _choose_greedily(features_by_point: dict[int, set[Any]], picked: list[int]) -> list[int]:
    """``picked`` and more, until all that is shown by any is shown by these; those that add most come first."""
    covered: set[Any] = set().union(*(features_by_point[i] for i in picked))
    for gain in range(max(map(len, features_by_point.values()), default=0), 0, -1):
        for i, features in features_by_point.items():
            if len(features - covered) >= gain:
                covered |= features
                picked.append(i)
    return picked


def _axis_name(entry: tuple[str, Any]) -> str:
    return entry[0]


def examples(count: int) -> int:
    """How many examples a property gets that needs another number than most: so many with ``--full``, fewer without."""
    return max(2, count * settings().max_examples // EXAMPLES)
