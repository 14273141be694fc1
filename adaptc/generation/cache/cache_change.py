"""Make a call's change to its caller's cache all or nothing.

After a call that ended, the cache holds what the call wrote. After one that raised or was interrupted, at whatever
line, the cache is as it was. A step may have overwritten what that needs, such as a state or entries of a ring. Then
the cache is marked as unfinished, and every later call refuses it.
"""

from __future__ import annotations

from typing import Any

from adaptc.generation.cache.step_cache import StepCache


class CacheChange:
    """A context in which a call writes to the cache ``past``.

    ``generating`` says that all steps of a generation write, and not one step. The cache is marked from the first line
    to the last, so no interrupt goes unnoticed, in the block or in this class.
    """

    def __init__(self, past: StepCache, generating: bool = False) -> None:
        self.past, self.flag_name = past, "generating" if generating else "unfinished"
        self.restore_point: dict[str, Any] = {}
        self.saved_last_position: list[Any] = []

    def __enter__(self) -> None:
        past = self.past
        kept = dict(vars(past), mask=past.mask.clone())
        if self.flag_name == "generating" and past.length:
            self.saved_last_position = [t.clone() for t in past.last_position()]
        self.restore_point = kept
        vars(past)[self.flag_name] = True

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # The mark is removed last: a call that is interrupted before that counts as failed.
        vars(self.past).update(
            {self.flag_name: self.restore_point[self.flag_name]} if kind is None else self._restore()
        )

    def _restore(self) -> dict[str, bool]:
        """Restore the cache, which stays marked until that is done, and return the marks that it has then."""
        past, kept = self.past, self.restore_point
        vars(past).update(kept, unfinished=True)
        for now, was in zip(past.last_position(), self.saved_last_position, strict=False):
            now.copy_(was)
        if not past.is_intact and past.length <= past.prefix_length:
            past.reset()  # the cache holds nothing but virtual tokens
        return {"unfinished": kept["unfinished"] or not past.is_intact}
