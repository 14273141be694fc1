"""Work on graphs, one thread at a time.

Programs made of one another share fake tensors, their shape environment and parts of their graphs, and tracing patches
torch for all threads of the process. So whoever traces, rewrites, validates, reads or writes a graph holds one lock,
:data:`GRAPHS`, for as long as it takes. Calls and swaps do without it: they read what was made before.

Tensors that are made meanwhile are kept. So whatever a caller has on in torch (transforms, modes, autocast, inference
mode) is off for whoever takes the lock by :func:`on_graphs`.

A graph is a million small objects that all live on. Python's collector would look through them again and again, for a
fifth of the time of a capture and more, so it rests meanwhile.

What must hold: whoever holds another lock does not ask for this one, so that no two threads wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

from adaptc.locks import free_in_children
from adaptc.torch_modes import plainly

P = ParamSpec("P")
R = TypeVar("R")

GRAPHS = free_in_children(threading.RLock())


class _Held:
    """The thread that took the lock by :func:`on_graphs`. A child that was forked has none of its parent's threads."""

    by: int | None = None


_HELD = _Held()


@contextlib.contextmanager
def on_graphs() -> Iterator[None]:
    """:data:`GRAPHS`, with nothing on in torch that was on outside. What its holder enters after that stays on."""
    with GRAPHS:
        if _HELD.by == threading.get_ident():
            yield
            return
        collects = gc.isenabled()
        with plainly():
            try:
                _HELD.by = threading.get_ident()
                gc.disable()
                yield
            finally:
                _HELD.by = None
                if collects:
                    gc.enable()


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, run by one thread at a time, and while no other works on graphs."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with on_graphs():
            return function(*args, **kwargs)

    return alone


class exclusive_property(Generic[R]):
    """A value worked out once per object, by one thread at a time: as ``functools.cached_property`` does, which in
    Python 3.11 would hold a lock of its own besides."""

    def __init__(self, function: Callable[[Any], R]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> R:
        if owner is None:
            return self  # type: ignore[return-value]
        known, name = vars(owner), self.function.__name__
        with on_graphs():
            if name not in known:
                known[name] = self.function(owner)
        return known[name]
