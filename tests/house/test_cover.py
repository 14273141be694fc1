"""The cover of the tests: every value and every pair of values is met, and what is marked otherwise is honoured."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cover import cover, pairwise, parse_part, part


@dataclass
class Item:
    nodeid: str
    params: dict[str, Any]
    marks: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def callspec(self) -> Any:
        return SimpleNamespace(params=self.params)

    def get_closest_marker(self, name: str) -> Any:
        return SimpleNamespace(args=self.marks[name]) if name in self.marks else None


def items(test: str, axes: dict[str, list[Any]], **marks: tuple[Any, ...]) -> list[Item]:
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return [Item(f"tests/a.py::{test}[{'-'.join(map(str, p.values()))}]", p, dict(marks)) for p in points]


def kept(given: list[Item]) -> list[dict[str, Any]]:
    return [item.params for item, keep in zip(given, cover(given), strict=True) if keep]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_every_pair_that_exists_is_met(sizes: list[int], data: st.DataObject) -> None:
    points = [dict(zip("abcd", p, strict=False)) for p in product(*(range(n) for n in sizes))]
    points = data.draw(st.lists(st.sampled_from(points), min_size=1, unique_by=str))
    picked = [points[i] for i in pairwise(dict(enumerate(points)))]

    def shown(of: list[dict[str, Any]]) -> set[Any]:
        values = {entry for p in of for entry in p.items()}
        return values | {pair for p in of for pair in combinations(sorted(p.items()), 2)}

    assert shown(picked) == shown(points)


def test_a_product_becomes_far_smaller() -> None:
    axes: dict[str, list[Any]] = {"method": list(range(20)), "layer": list(range(10)), "check": list(range(10))}
    assert 200 <= len(kept(items("t", axes))) < 320


def test_what_takes_long_runs_once_unless_it_says_how_many() -> None:
    axes: dict[str, list[Any]] = {"a": list(range(5)), "b": list(range(4))}
    assert len(kept(items("t", axes, long=()))) == 1
    assert len(kept(items("t", axes, long=(), few=(7,)))) == 7


def test_one_axis_is_kept_whole_and_no_axis_too() -> None:
    assert len(kept(items("t", {"a": list(range(9))}))) == 9
    assert kept([Item("tests/a.py::t", {})]) == [{}]


def test_few_are_those_that_show_most_values() -> None:
    chosen = kept(items("t", {"a": list(range(5)), "b": list(range(4))}, few=(5,)))
    assert len(chosen) == 5
    assert {p["a"] for p in chosen} == set(range(5))
    assert {p["b"] for p in chosen} == set(range(4))


def test_slow_ones_are_left_out_and_count_for_nothing() -> None:
    given = items("t", {"a": [1, 2, 3]})
    given[1].marks["slow"] = ()
    assert [p["a"] for p in kept(given)] == [1, 3]


def test_tests_of_one_file_choose_alike_and_other_files_otherwise() -> None:
    """What is built for a parameter is shared in a file, also where pytest has put its tests between one another."""
    one, two = items("t", {"a": list(range(30))}, few=(5,)), items("u", {"a": list(range(30))}, few=(5,))
    mixed = [item for pair in zip(one, two, strict=True) for item in pair]
    assert kept(one) == kept(two)
    assert kept(mixed) == [p for p in kept(one) for _ in range(2)]
    other = [Item(i.nodeid.replace("a.py", "b.py"), i.params, i.marks) for i in one]
    assert kept(other) != kept(one)


def test_objects_are_told_apart_by_who_they_are() -> None:
    def f() -> None: ...
    def g() -> None: ...

    assert len(kept(items("t", {"check": [f, g], "n": [1, 2]}))) == 4


@given(st.integers(1, 5), st.lists(st.sampled_from("abcdefg"), min_size=1))
def test_parts_divide_the_files_and_have_each_once(parts: int, files: list[str]) -> None:
    given = [Item(f"tests/{f}.py::t[{i}]", {"i": i}) for i, f in enumerate(files)]
    kept = [[i for i, k in zip(given, part(given, which, parts), strict=True) if k] for which in range(1, parts + 1)]
    assert sorted(i.nodeid for some in kept for i in some) == sorted(i.nodeid for i in given)
    homes = [{i.nodeid.partition("::")[0] for i in some} for some in kept]
    assert sum(map(len, homes)) == len({*files})
    assert max(map(len, homes)) - min(map(len, homes)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "/2", "a/b", "-1/2", "1/0"])
def test_a_part_that_is_not_there_is_refused(text: str) -> None:
    assert parse_part("2/2") == (2, 2)
    with pytest.raises(ValueError, match="K/N"):
        parse_part(text)
