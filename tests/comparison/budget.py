"""The value of an option whose number of trained parameters is nearest to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from adaptc import AdaptcError, ConfigError

#: values that are farther away, after which the search ends; one alone may be rounding
_WORSE = 2


def nearest_value(values: Sequence[Any], count: Callable[[Any], int], budget: int) -> tuple[Any, int]:
    """Return the value whose count has the smallest ratio to ``budget``, and its count.

    Of two values that are equally near, the earlier one is taken. Counts rise or fall along ``values``, so the search
    ends where :data:`_WORSE` values in a row were farther from the budget than the nearest. A value that the method
    refuses, by an AdaptcError, is no candidate. Raises ConfigError that names the refusals where no value is left.
    """
    refusals: dict[Any, AdaptcError] = {}
    counts: list[tuple[float, Any, int]] = []
    for value in values:
        try:
            found = count(value)
        except AdaptcError as error:
            refusals[value] = error
        else:
            ratio = max(found, budget) / min(found, budget) if found else math.inf
            counts.append((ratio, value, found))
            nearest = min(ratio for ratio, _, _ in counts)
            if all(ratio > nearest for ratio, _, _ in counts[-_WORSE:]):
                break
    if not counts:
        said = "; ".join(f"{value!r}: {error}" for value, error in refusals.items())
        raise ConfigError(f"no value of {list(values)} gives a number of parameters near {budget}: {said}")
    _, value, found = min(counts, key=lambda c: c[0])
    return value, found


def extrapolated(one: int, two: int, layers: int) -> int:
    """Return the count for a model of ``layers`` layers, from those for the same model with one and with two.

    A method may share parameters between layers, so a layer's own ones are those that the second layer adds.
    """
    return one + (layers - 1) * (two - one)
