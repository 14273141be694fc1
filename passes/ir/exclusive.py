"""Work on graphs, one thread at a time.

Programs made of one another share fake tensors, their shape environment and parts of their graphs, and tracing patches
torch for all threads of the process. So whoever traces, rewrites, validates, reads or writes a graph holds one lock,
:data:`GRAPHS`, for as long as it takes. Calls and swaps do without it: they read what was made before.

What must hold: whoever holds another lock does not ask for this one, so that no two threads wait for each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from adaptc.passes.ir.locks import free_in_children

P = ParamSpec("P")
R = TypeVar("R")

GRAPHS = free_in_children(threading.RLock())


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, run by one thread at a time, and while no other works on graphs."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with GRAPHS:
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
        with GRAPHS:
            if name not in known:
                known[name] = self.function(owner)
        return known[name]
