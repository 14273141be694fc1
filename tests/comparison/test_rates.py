"""The learning rate that follows from the losses of a search."""

from __future__ import annotations

import math

import pytest

from tests.comparison.rates import best_rate


@pytest.mark.parametrize("lowest", [0.003, 0.0071, 0.01, 0.019, 0.05])
def test_the_lowest_point_of_a_parabola_is_found(lowest: float) -> None:
    losses = {rate: 0.3 + 0.7 * math.log(rate / lowest) ** 2 for rate in (0.05, 0.002, 0.01)}
    assert best_rate(losses) == pytest.approx(lowest)


def test_it_stays_within_the_rates() -> None:
    assert best_rate({0.002: 5.0, 0.01: 3.0, 0.05: 1.5}) == pytest.approx(0.05)
    assert best_rate({0.002: 1.5, 0.01: 3.0, 0.05: 5.0}) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 1.0, 0.5), 0.05),  # it bends down
        ((3.0, 2.0, 1.0), 0.05),  # a straight line
        ((0.7, 0.9, math.nan), 0.002),
        ((math.nan, 0.9, math.inf), 0.01),
        ((math.nan, math.nan, math.nan), 0.002),
    ],
)
def test_losses_without_a_lowest_point_have_a_smallest(losses: tuple[float, ...], expected: float) -> None:
    assert best_rate(dict(zip((0.002, 0.01, 0.05), losses, strict=True))) == expected
