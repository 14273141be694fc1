"""The values by which a program runs and shows itself, each replaced as a whole.

Before an assignment of one of them: the new value is complete. After: whoever reads it has all of it, in any thread.
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
from adaptc.passes.ir.exclusive import on_graphs
from adaptc.program.views import SCALE, views
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions


@dataclass(frozen=True, eq=False)
class Running:
    """What a call reads: the binding, how the program runs, and, once they were made, the code for both and the base's
    program. ``others``: the binding with other scales, for calls that ask for them, by what they ask."""

    binding: Binding | None
    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None
    base: Any = None
    others: dict[Hashable, Binding] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Exported:
    """What an exported program shows, graph and tensors, and the binding they are those of; None at first. It is held
    weakly: when it is current no more, what was computed for it may go."""

    module: fx.GraphModule
    tensors: dict[str, Any]
    binding: weakref.ref[Binding] | None = None

    def shows(self, binding: Binding) -> bool:
        return self.binding is not None and self.binding() is binding


def called(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of ``program``, with the binding it has when the call begins."""
    now = program.running
    if SCALE in kwargs or views():
        now, kwargs = asked(program, kwargs)
    elif now.arguments is None:
        now = program.ready()
    return now.executor(now.arguments, args, kwargs)


def asked(program: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a call reads that may ask for other scales than the program's, and the inputs of the model."""
    now, inputs = program.ready(), dict(kwargs)
    mine = SCALE in now.executor.inputs.names or SCALE in now.executor.inputs.takes
    return program.ready_for(None if mine else inputs.pop(SCALE, None)), inputs


def called_as(now: Running, *args: Any, **kwargs: Any) -> Any:
    """A call as a program was when it was made ready, whatever it is now."""
    assert now.executor is not None
    assert now.arguments is not None
    return now.executor(now.arguments, args, kwargs)


def check_replaced(base: Mapping[str, Any], meant: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises AdaptcError where a base tensor is not of the shape, dtype and device that was meant."""
    for fqn, (shape, dtype, device) in meant.items():
        t = base.get(fqn)
        if t is not None and (t.shape, t.dtype, t.device) != (shape, dtype, device):
            raise AdaptcError(
                f"{fqn!r} was replaced by a tensor {tuple(t.shape)} of {t.dtype} on {t.device}, and the program was "
                f"made for {tuple(shape)} of {dtype} on {device}. Give it back, or compile the model again"
            )


@dataclass(eq=False)
class RunState:
    """What a program remembers while it runs. ``traces``, ``merged``: what was traced and merged before. ``modules``
    and ``bound``: the modules and callables made of it that still are, and ``codes`` what the latter run where their
    options are not the program's; ``parts``: beside each code, that of parts of the program. The lock is for
    assignments that follow from what was there; it is never held for long."""

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
        """What calls read from now on, to be made anew; what is bound follows its limit. The caller has the lock."""
        self.now = now
        self.codes.clear()
        for bound in self.bound:
            bound.limit(now.options.hoist_limit)

    def join(self, bound: Any) -> None:
        """``bound`` follows the limit on what is computed once, from now on."""
        with self.lock:
            self.bound.add(bound)
            bound.limit(self.now.options.hoist_limit)

    def code(self, options: RunOptions, make: Callable[[], Executor]) -> Executor:
        """The code for calls with other options than the program's, shared by all who are bound to it."""
        with on_graphs():
            made = self.codes.get(options)
            if made is None:
                made = self.codes[options] = make()
            return made
