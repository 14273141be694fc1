"""Repeat work for some seconds, and for longer where a slow machine has done too little of it by then.

A test that counts what was done in a time fails on a busy machine. This one waits until enough was done, and fails only
where that takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: how much longer than asked for the work may take, in seconds
PATIENCE = 120.0


class Turns:
    """A clock for threads that repeat something: ``while turns.go_on(): ...``.

    ``enough`` tells whether what was done suffices for the test. After ``seconds`` the work stops as soon as it does.
    """

    def __init__(self, seconds: float, enough: Callable[[], bool]) -> None:
        self.enough, self.end = enough, time.monotonic() + seconds

    def go_on(self) -> bool:
        now = time.monotonic()
        return now < self.end or (now < self.end + PATIENCE and not self.enough())
