"""Find where a sequence repeats itself: stretches like abcabcabc, by their period."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RepeatedStretch(NamedTuple):
    """A stretch of ``length`` items from ``first`` on, that repeats itself after ``period`` items.

    ``sequence[i] == sequence[i + period]`` where both lie in it.
    """

    first: int
    period: int
    length: int

    @property
    def covered(self) -> int:
        """Return the number of items in whole periods."""
        return self.length // self.period * self.period


def repeats(sequence: Sequence[int], most: int) -> list[RepeatedStretch]:
    """Return the runs of at least two periods that cover most of ``sequence``, at most ``most`` of them.

    Of each period, only the longest run counts. The best comes first; of equal ones, that of the shorter period.
    """
    items, found, enough = torch.tensor(sequence, dtype=torch.int64), [], 0
    for period in range(1, len(sequence) // 2 + 1):
        same = items[period:] == items[:-period]
        # This cheap count rules out most periods.
        if int(same.sum()) < max(period, enough):
            continue
        breaks = torch.cat([torch.tensor([-1]), (~same).nonzero()[:, 0], torch.tensor([len(same)])])
        lengths = breaks.diff() - 1
        longest = int(lengths.argmax())
        run = RepeatedStretch(int(breaks[longest]) + 1, period, int(lengths[longest]) + period)
        if run.length >= 2 * period:
            found.append(run)
            # A period with fewer matches cannot cover half as much as this one.
            enough = max(enough, run.covered // 4)
    return sorted(found, key=lambda run: (-run.covered, run.period))[:most]
