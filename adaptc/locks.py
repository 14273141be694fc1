"""Locks that nobody holds in a process that was forked.

A fork copies locks as they are, and none of the threads that held them. Before: a lock. After: the same lock, which is
free in a child, unless the thread that forked holds it itself.

Private use of Python's: ``_at_fork_reinit``, which the standard library has its own locks freed by. Public:
``release``, which an RLock refuses to all but its owner, who is not there any more.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, TypeVar

L = TypeVar("L")

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def reset_after_fork(lock: L) -> L:
    """Return ``lock``, a ``threading.Lock`` or ``RLock``, after noting it."""
    _locks.add(lock)
    return lock


def _reset_all() -> None:
    for lock in list(_locks):
        if lock.acquire(blocking=False):  # it is free, or this thread's own
            lock.release()
        else:
            lock._at_fork_reinit()  # noqa: SLF001


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_reset_all)
