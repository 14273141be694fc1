"""Which tests run when not all of them do: a cover of the products, and no slow lanes.

A test with parameters runs for every value of each of them, and, where it has several, for every pair of values of two:
most faults show by a value or by a pair. A test marked ``few(n)`` runs for n of its combinations, first those that show
new values: another choice in each file, so that all values of what many tests share (families of models) are met by
some. ``pytest --full`` runs the whole product, and what is marked ``slow``.
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
#: how many examples most properties get with ``--full``
EXAMPLES = 20


def cover(items: Sequence[Any]) -> list[bool]:
    """For each item whether it is part of the cover."""
    tests: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        tests.setdefault(item.nodeid.partition("[")[0], []).append(i)
    kept = {i for places in tests.values() for i in _chosen(items, places)}
    return [i in kept for i in range(len(items))]


def _chosen(items: Sequence[Any], places: list[int]) -> list[int]:
    """Of the places of one test's items those that run."""
    first = items[places[0]]
    few = first.get_closest_marker("few")
    # By the file and the parameters: tests of one file, which may share what is built for a parameter, choose alike.
    home = first.nodeid.partition("::")[0]
    order = sorted(places, key=lambda i: zlib.crc32((home + items[i].nodeid.partition("[")[2]).encode()))
    picked = pairwise({i: axes_of(items[i]) for i in order if items[i].get_closest_marker("slow") is None})
    return picked if few is None else picked[: few.args[0]]


def axes_of(item: Any) -> Axes:
    """Parameter -> value of an item; objects are told apart by who they are."""
    call = getattr(item, "callspec", None)
    if call is None:
        return {}
    return {n: v if isinstance(v, (str, int, float)) else ("#", id(v)) for n, v in call.params.items()}


def pairwise(points: dict[int, Axes]) -> list[int]:
    """Points that together have every pair of values of two axes that any point has (every value, where there is one
    axis). Those that show most values not seen before come first, then those that show most pairs."""
    picked = _greedy({i: set(axes.items()) or {None} for i, axes in points.items()}, [])
    return _greedy({i: set(combinations(sorted(axes.items(), key=_name), 2)) for i, axes in points.items()}, picked)


def _greedy(shown: dict[int, set[Any]], picked: list[int]) -> list[int]:
    """``picked`` and more, until all that is shown by any is shown by these; those that add most come first."""
    seen: set[Any] = set().union(*(shown[i] for i in picked))
    for wanted in range(max(map(len, shown.values()), default=0), 0, -1):
        for i, own in shown.items():
            if len(own - seen) >= wanted:
                seen |= own
                picked.append(i)
    return picked


def _name(entry: tuple[str, Any]) -> str:
    return entry[0]


def examples(count: int) -> int:
    """How many examples a property gets that needs another number than most: so many with ``--full``, fewer without."""
    return max(2, count * settings().max_examples // EXAMPLES)
