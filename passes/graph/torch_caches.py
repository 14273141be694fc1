"""Release what torch keeps of graphs that are gone.

Without this, a process that compiles, loads, merges and swaps for weeks would hold more than the programs that it still
has. Nothing here changes what a program computes.

Private torch use, with the public route that was tried:
- ``ShapeEnv.tracked_fakes`` and the caches of its class. Public: none, nor is there a public way to the environment.
- ``torch.fx.graph_module._loader`` keeps the text of all code that ``fx.GraphModule`` ever made, for tracebacks.
  Public: none; ``linecache.clearcache`` empties only linecache's own table, and does so for all other modules too.
"""

from __future__ import annotations

import gc
import linecache
import types
from collections.abc import Iterator

from torch import fx
from torch.fx.graph_module import _loader

from adaptc.passes.graph.lifted import fake_mode_of

#: the numbers of texts, and of characters in them, above which :func:`forget_code` looks for dead code
MOST, LONGEST = 1024, 1 << 25
_next: list[tuple[int, int]] = [(MOST, LONGEST)]


def forget_sizes(graph: fx.Graph, *, captured: bool) -> None:
    """Make torch free a graph's shape environment once nothing refers to the graph any more.

    Caches of its class hold every environment forever. A cycle through C++ does too: from the environment to the fake
    inputs that it checks its guards with, and back. No garbage collector sees that cycle. ``captured`` says that the
    graph was just captured and its guards are made.
    """
    env = getattr(fake_mode_of(graph), "shape_env", None)
    for function in vars(type(env)).values():
        clear = getattr(function, "cache_clear", None)
        if clear is not None:
            clear()
    if captured and env is not None and env.tracked_fakes:
        env.tracked_fakes.clear()


def _forwards(cls: type) -> Iterator[types.FunctionType]:
    """Yield the ``forward`` functions of all graph modules that exist; each module has a class of its own.

    ``gc.get_objects`` would find them too. But it returns tuples that other threads are still filling, which then fails
    for these threads.
    """
    for sub in cls.__subclasses__():
        forward = vars(sub).get("forward")
        if isinstance(forward, types.FunctionType):
            yield forward
        yield from _forwards(sub)


def forget_code(*, now: bool = False) -> None:
    """Drop the texts of code that is gone, if many were added since the last time.

    ``now`` drops them in any case. The caller must hold ``GRAPHS``.
    """
    texts = _loader.eval_cache
    most, longest = _next[0]
    if not now and len(texts) <= most and sum(map(len, list(texts.values()))) <= longest:
        return
    gc.collect()
    known = list(texts)
    alive = {f.__code__.co_filename for f in _forwards(fx.GraphModule)}
    for name in known:
        if name not in alive:
            texts.pop(name, None)
            linecache.cache.pop(name, None)
    left = list(texts.values())
    _next[0] = max(MOST, 2 * len(left)), max(LONGEST, 2 * sum(map(len, left)))
