"""Find where a sequence repeats itself: stretches like abcabcabc, by their period."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """``sequence[i] == sequence[i + period]`` for all i for which both lie in ``length`` items from ``first`` on."""

    first: int
    period: int
    length: int

    @property
    def covered(self) -> int:
        """The items in whole periods."""
        return self.length // self.period * self.period


def repeats(sequence: Sequence[int], most: int) -> list[Run]:
    """The longest run of each period, of those with two whole periods or more: the ``most`` that cover most of the
    sequence, then those of shorter periods first."""
    items, found, enough = torch.tensor(sequence, dtype=torch.int64), [], 0
    for period in range(1, len(sequence) // 2 + 1):
        same = items[period:] == items[:-period]
        # Most periods are told by this count alone.
        if int(same.sum()) < max(period, enough):
            continue
        breaks = torch.cat([torch.tensor([-1]), (~same).nonzero()[:, 0], torch.tensor([len(same)])])
        lengths = breaks.diff() - 1
        longest = int(lengths.argmax())
        run = Run(int(breaks[longest]) + 1, period, int(lengths[longest]) + period)
        if run.length >= 2 * period:
            found.append(run)
            # A shorter one covers less than half as much as this one.
            enough = max(enough, run.covered // 4)
    return sorted(found, key=lambda run: (-run.covered, run.period))[:most]
