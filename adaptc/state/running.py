"""Hold the values by which a program runs and shows itself, each of which is replaced as a whole.

A new value is complete before it is assigned. Whoever reads it, in any thread, has all of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.locks import free_in_children
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions
from adaptc.state.overrides import SCALE, views


@dataclass(frozen=True, eq=False)
class Running:
    """The values that a call reads: the binding and the options, and the code and arguments for them once these were
    made.

    ``base``: the program of the base, once it was made. ``others``: what a call asks for -> the binding with these
    other scales.
    """

    binding: Binding | None
    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None
    base: Any = None
    others: dict[Hashable, Binding] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Exported:
    """The graph and tensors that an exported program shows, and the binding that the tensors belong to; None at first.

    The binding is held weakly, so that the values hoisted for it are freed when it is no longer current.
    """

    module: fx.GraphModule
    tensors: dict[str, Any]
    binding: weakref.ref[Binding] | None = None

    def shows(self, binding: Binding) -> bool:
        return self.binding is not None and self.binding() is binding


def called(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``program`` with the binding that it has when the call begins."""
    now = program.running
    if SCALE in kwargs or views():
        now, kwargs = asked(program, kwargs)
    elif now.arguments is None:
        now = program.ready()
    return now.executor(now.arguments, args, kwargs)


def asked(program: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what a call that may ask for other scales reads, and the inputs of the model: ``kwargs`` without the
    scale. A model whose own input has that name keeps it."""
    now, inputs = program.ready(), dict(kwargs)
    mine = SCALE in now.executor.inputs.names or SCALE in now.executor.inputs.takes
    return program.ready_for(None if mine else inputs.pop(SCALE, None)), inputs


def called_as(now: Running, *args: Any, **kwargs: Any) -> Any:
    """Call a program as it was when ``now`` was made ready, whatever it has become since."""
    assert now.executor is not None
    assert now.arguments is not None
    return now.executor(now.arguments, args, kwargs)


def check_replaced(base: Mapping[str, Any], meant: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise AdaptcError where a base tensor has another shape, dtype or device than ``meant`` says."""
    for fqn, (shape, dtype, device) in meant.items():
        t = base.get(fqn)
        if t is not None and (t.shape, t.dtype, t.device) != (shape, dtype, device):
            raise AdaptcError(
                f"{fqn!r} was replaced by a tensor {tuple(t.shape)} of {t.dtype} on {t.device}, and the program was "
                f"made for {tuple(shape)} of {dtype} on {device}. Give it back, or compile the model again"
            )


@dataclass(eq=False)
class RunState:
    """The memory of a running program.

    ``traces`` and ``merged``: memos of traced regions and of merged programs. ``modules`` and ``bound``: the modules
    and callables made of the program that still exist. ``codes``: the code of bound callables whose options are not the
    program's. ``parts``: for the code of a whole program, the code of its parts. ``lock``: for assignments that depend
    on the value before them; it is never held for long.
    """

    now: Running
    exported: Exported
    traces: dict[Any, fx.Graph] = field(default_factory=dict)
    merged: dict[Any, Any] = field(default_factory=dict)
    modules: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    bound: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    codes: weakref.WeakValueDictionary[RunOptions, Executor] = field(default_factory=weakref.WeakValueDictionary)
    parts: weakref.WeakKeyDictionary[Executor, dict[Any, Executor]] = field(default_factory=weakref.WeakKeyDictionary)
    lock: threading.RLock = field(default_factory=lambda: free_in_children(threading.RLock()))

    def switch(self, now: Running) -> None:
        """Let calls read ``now`` from here on, and make bound callables follow its limit on hoisted values. The caller
        holds the lock."""
        self.now = now
        self.codes.clear()
        for bound in self.bound:
            bound.limit(now.options.hoist_limit)

    def join(self, bound: Any) -> None:
        """Make ``bound`` follow the program's limit on hoisted values from now on."""
        with self.lock:
            self.bound.add(bound)
            bound.limit(self.now.options.hoist_limit)

    def code(self, options: RunOptions, make: Callable[[], Executor]) -> Executor:
        """Return the code for calls with ``options`` other than the program's, shared by all bound callables; ``make``
        makes it."""
        with on_graphs():
            made = self.codes.get(options)
            if made is None:
                made = self.codes[options] = make()
            return made
