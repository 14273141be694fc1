"""Sequences that repeat themselves: against a search by hand, and planted repeats that must be found."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.passes.analysis.block_chains import RepeatedStretch, find_repeats
from tests.support.cover import examples


def longest(sequence: list[int], period: int) -> int:
    """The longest stretch that repeats itself with that period."""
    best = 0
    for first in range(len(sequence)):
        length = period
        while first + length < len(sequence) and sequence[first + length] == sequence[first + length - period]:
            length += 1
        best = max(best, length)
    return best


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(0, 2), max_size=25))
def test_runs_repeat_and_none_is_better(sequence: list[int]) -> None:
    found = find_repeats(sequence, 100)
    for run in found:
        items = sequence[run.first : run.first + run.length]
        assert len(items) == run.length >= 2 * run.period
        assert items[run.period :] == items[: -run.period]
    covered = [run.covered for run in found]
    assert covered == sorted(covered, reverse=True)
    by_hand = [longest(sequence, p) // p * p for p in range(1, len(sequence) // 2 + 1) if longest(sequence, p) >= 2 * p]
    assert max(covered, default=0) == max(by_hand, default=0)
    assert find_repeats(sequence, 1) == found[:1]


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9, unique=True), st.integers(2, 7), st.integers(0, 5))
def test_what_was_planted_is_found(block: list[int], times: int, around: int) -> None:
    before, behind = list(range(10, 10 + around)), list(range(20, 20 + around))
    assert find_repeats([*before, *block * times, *behind], 1) == [
        RepeatedStretch(around, len(block), len(block) * times)
    ]


def test_nothing_repeats() -> None:
    assert find_repeats([], 3) == find_repeats([1], 3) == find_repeats([1, 2, 3, 1], 3) == []
