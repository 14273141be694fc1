"""The learning rate that a few measured losses speak for."""

from __future__ import annotations

import math
from collections.abc import Mapping


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate at the lowest point of the parabola through three losses, over the logarithm of the rate.

    ``losses``: rate -> loss, where each rate is the same multiple of the one before. The nearest of the three would be
    off by up to a factor of two. The result lies between the first rate and the last. Where the parabola has no lowest
    point, or a loss is not finite, it is the rate with the smallest loss.
    """
    rates = sorted(losses)
    low, middle, high = (losses[rate] for rate in rates)
    bend, slope = (low + high) / 2 - middle, (high - low) / 2
    if not math.isfinite(bend) or bend <= 0:
        return min((rate for rate in rates if math.isfinite(losses[rate])), key=losses.__getitem__, default=rates[0])
    place = max(-1.0, min(1.0, -slope / (2 * bend)))
    return rates[1] * (rates[2] / rates[1]) ** place
