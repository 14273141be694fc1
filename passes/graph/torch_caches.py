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
from typing import Any, cast

from torch import fx
from torch.fx.graph_module import _loader  # pyright: ignore[reportPrivateUsage]  # the docstring says why

from adaptc.passes.graph.lifted import fake_mode_of

#: the numbers of texts, and of characters in them, above which :func:`drop_dead_code` looks for dead code
MAX_TEXTS, MAX_CHARACTERS = 4096, 1 << 25
_next_limits: list[tuple[int, int]] = [(MAX_TEXTS, MAX_CHARACTERS)]


def release_shape_env(graph: fx.Graph, *, just_captured: bool) -> None:
    """Make torch free a graph's shape environment once nothing refers to the graph any more.

    Caches of its class hold every environment forever. A cycle through C++ does too: from the environment to the fake
    inputs that it checks its guards with, and back. No garbage collector sees that cycle. ``just_captured`` says that
    the graph was just captured and its guards are made.
    """
    env = getattr(fake_mode_of(graph), "shape_env", None)
    for function in vars(cast(type, type(env))).values():  # any class
        clear = getattr(function, "cache_clear", None)
        if clear is not None:
            clear()
    if just_captured and env is not None and env.tracked_fakes:
        env.tracked_fakes.clear()


def _forward_functions(cls: type) -> Iterator[types.FunctionType]:
    """Yield the ``forward`` functions of all graph modules that exist; each module has a class of its own.

    ``gc.get_objects`` would find them too. But it returns tuples that other threads are still filling, which then fails
    for these threads.
    """
    for sub in cls.__subclasses__():
        forward = vars(sub).get("forward")
        if isinstance(forward, types.FunctionType):
            yield forward
        yield from _forward_functions(sub)


def drop_dead_code(*, force: bool = False) -> None:
    """Drop the texts of code that is gone, if many were added since the last time.

    ``force`` drops them in any case. The caller must hold ``GRAPH_LOCK``.
    """
    loader: Any = _loader
    texts: dict[str, str] = loader.eval_cache
    max_texts, max_characters = _next_limits[0]
    if not force and len(texts) <= max_texts and sum(map(len, list(texts.values()))) <= max_characters:
        return
    gc.collect()
    names = list(texts)
    alive = {f.__code__.co_filename for f in _forward_functions(fx.GraphModule)}
    for name in names:
        if name not in alive:
            texts.pop(name, None)
            linecache.cache.pop(name, None)
    left = list(texts.values())
    _next_limits[0] = max(MAX_TEXTS, 2 * len(left)), max(MAX_CHARACTERS, 2 * sum(map(len, left)))
