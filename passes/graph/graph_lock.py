"""Work on graphs in one thread at a time.

Programs made of one another share fake tensors, their shape environment and parts of their graphs. Tracing patches
torch for all threads of the process. So code that traces, rewrites, validates, reads or writes a graph holds one lock,
:data:`GRAPH_LOCK`, all the while. Calls and swaps do without it: they read what was made before.

Tensors that are made under the lock are kept. So whatever a caller has switched on in torch (transforms, modes,
autocast, inference mode) is off under :func:`hold_graph_lock`.

A graph is a million small objects that all stay alive. Python's garbage collector would scan them again and again, for
a fifth of the time of a capture or more. So it is off under the lock.

A thread that holds another lock must not take this one. Otherwise two threads could wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, ParamSpec, TypeVar

from adaptc.locks import reset_after_fork
from adaptc.torch_modes import outside_modes

P = ParamSpec("P")
R = TypeVar("R")

#: the lock on all graphs; free in a forked child, unless the thread that forked holds it
GRAPH_LOCK = reset_after_fork(threading.RLock())


class _LockOwner:
    """The thread that took the lock by :func:`hold_graph_lock`. A forked child has none of its parent's threads."""

    thread_id: int | None = None


_LOCK_OWNER = _LockOwner()


@contextlib.contextmanager
def hold_graph_lock() -> Generator[None]:
    """Run the block with :data:`GRAPH_LOCK` held, Python's garbage collector off, and torch's modes of the caller off.

    A mode that the block itself enters stays on, also in nested uses.
    """
    with GRAPH_LOCK:
        if _LOCK_OWNER.thread_id == threading.get_ident():
            yield
        else:
            with _without_collector(), outside_modes():
                yield


@contextlib.contextmanager
def _without_collector() -> Generator[None]:
    """Run the block, the first in this thread that holds the lock, with Python's garbage collector off."""
    gc_was_enabled = gc.isenabled()
    try:
        _LOCK_OWNER.thread_id = threading.get_ident()
        gc.disable()
        yield
    finally:
        _LOCK_OWNER.thread_id = None
        if gc_was_enabled:
            gc.enable()


def with_graph_lock(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` wrapped to run under :func:`hold_graph_lock`, so that no other thread works on graphs
    meanwhile."""

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with hold_graph_lock():
            return function(*args, **kwargs)

    return locked


class graph_locked_property(Generic[R]):
    """A property that is computed once per object, under :func:`hold_graph_lock`.

    It replaces ``functools.cached_property``, which in Python 3.11 would hold a lock of its own besides.
    """

    def __init__(self, function: Callable[[Any], R]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> R:
        if owner is None:
            return self  # type: ignore[return-value]
        known: dict[str, R] = owner.__dict__
        name = self.function.__name__
        with hold_graph_lock():
            if name not in known:
                known[name] = self.function(owner)
        return known[name]
