"""What a call does to a cache that its caller holds: all of it, or nothing.

Before: a cache, and a call that is about to write to it. After a call that ended: what it wrote. After one that raised
or was interrupted, at whatever line: the cache as it was. Where a step has written over what that needs (a state, the
places of a ring), it is marked instead, and every later call refuses it.
"""

from __future__ import annotations

from typing import Any

from adaptc.generation.cache import StepCache


class CacheChange:
    """A context in which ``past`` is written to. ``generating``: by all steps of a generation, not by one. The mark is
    there from the first line to the last, so that nothing that happens in between, or in here, goes unseen."""

    def __init__(self, past: StepCache, generating: bool = False) -> None:
        self.past, self.mark = past, "generating" if generating else "unfinished"
        self.kept: dict[str, Any] = {}
        self.last: list[Any] = []

    def __enter__(self) -> None:
        past = self.past
        kept = dict(vars(past), mask=past.mask.clone())
        if self.mark == "generating" and past.length:
            self.last = [t.clone() for t in past.last_position()]
        self.kept = kept
        vars(past)[self.mark] = True

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # The mark goes last of all: what is interrupted before it is gone has failed.
        vars(self.past).update({self.mark: self.kept[self.mark]} if kind is None else self._put_back())

    def _put_back(self) -> dict[str, bool]:
        """The cache as it was, marked as long as it is not; the marks that are right then."""
        past, kept = self.past, self.kept
        vars(past).update(kept, unfinished=True)
        for now, was in zip(past.last_position(), self.last, strict=False):
            now.copy_(was)
        if not past.intact and past.length <= past.begun:
            past.reset()  # there is nothing in it but what it begins with
        return {"unfinished": kept["unfinished"] or not past.intact}
