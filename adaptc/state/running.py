"""Hold the values by which a program runs and shows itself, each of which is replaced as a whole.

A new value is complete before it is assigned. Whoever reads it, in any thread, has all of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, BackendError
from adaptc.locks import reset_after_fork
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions
from adaptc.state.overrides import SCALE_KEYWORD, Override, active_overrides, scaling_of_call


@dataclass(frozen=True, eq=False)
class CallState:
    """The values that a call reads: the binding and the options, and the code and arguments for them once these were
    made.

    ``base_program``: the program of the base, once it was made. ``scaled_bindings``: the view of a call -> the
    binding with the scales of this view.
    """

    binding: Binding | None
    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None
    base_program: Any = None
    scaled_bindings: dict[Override, Binding] = field(default_factory=dict[Override, Binding])


@dataclass(frozen=True, eq=False)
class ExportedView:
    """The graph and tensors that an exported program shows, and the binding that the tensors belong to; None at first.

    The binding is held weakly, so that the values hoisted for it are freed when it is no longer current.
    """

    module: fx.GraphModule
    tensors: dict[str, Any]
    binding: weakref.ref[Binding] | None = None

    def shows_binding(self, binding: Binding) -> bool:
        return self.binding is not None and self.binding() is binding


def call_current(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``program`` with the binding that it has when the call begins."""
    if SCALE_KEYWORD in kwargs and not _is_model_input(program, SCALE_KEYWORD):
        inputs = {name: value for name, value in kwargs.items() if name != SCALE_KEYWORD}
        with scaling_of_call(program, kwargs[SCALE_KEYWORD], "program"):
            return call_current(program, args, inputs)
    now = program.call_state
    if now.arguments is None or active_overrides():
        now = program.compiled_state_of_call()
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        program.run_state.captured.add(now.binding)
    return now.executor(now.arguments, args, kwargs)


def _is_model_input(program: Any, name: str) -> bool:
    inputs = program.executor().inputs
    return name in inputs.names or name in inputs.forward_arg_names


def check_base_meta(base: Mapping[str, Any], expected_meta: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise AdaptcError where a base tensor has another shape, dtype or device than ``expected_meta`` says."""
    for fqn, (shape, dtype, device) in expected_meta.items():
        t = base.get(fqn)
        if t is not None and (t.shape, t.dtype, t.device) != (shape, dtype, device):
            raise AdaptcError(
                f"{fqn!r} was replaced by a tensor {tuple(t.shape)} of {t.dtype} on {t.device}, and the program was "
                f"made for {tuple(shape)} of {dtype} on {device}. Give it back, or compile the model again"
            )


@dataclass(eq=False)
class RunState:
    """The memory of a running program.

    ``traced_regions`` and ``merged_programs``: memos of traced regions and of merged programs. ``modules`` and
    ``bound``: the modules and callables made of the program that still exist. ``bound_executors``: the code of bound
    callables whose options are not the program's. ``part_executors``: for the code of a whole program, the code of its
    parts. ``captured``: the bindings with which a CUDA graph captured a call of the program, and not of what is bound.
    ``lock``: for assignments that depend on the value before them; it is never held for long.
    """

    call_state: CallState
    exported: ExportedView
    traced_regions: dict[Any, fx.Graph] = field(default_factory=dict[Any, fx.Graph])
    merged_programs: dict[Any, Any] = field(default_factory=dict[Any, Any])
    modules: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet[Any])
    bound: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet[Any])
    bound_executors: weakref.WeakValueDictionary[RunOptions, Executor] = field(
        default_factory=weakref.WeakValueDictionary[RunOptions, Executor]
    )
    part_executors: weakref.WeakKeyDictionary[Executor, dict[Any, Executor]] = field(
        default_factory=weakref.WeakKeyDictionary[Executor, dict[Any, Executor]]
    )
    captured: weakref.WeakSet[Binding] = field(default_factory=weakref.WeakSet[Binding])
    lock: threading.RLock = field(default_factory=lambda: reset_after_fork(threading.RLock()))

    def replace_call_state(self, state: CallState) -> None:
        """Let calls read ``state`` from here on, and make bound callables follow its limit on hoisted values. The
        caller holds the lock."""
        self.call_state = state
        self.bound_executors.clear()
        for bound in self.bound:
            bound.set_hoist_limit(state.options.hoist_limit)

    def check_not_captured(self, new: Binding) -> None:
        """Raise BackendError where a swap to ``new`` would leave a CUDA graph with the adapter that it captured."""
        old = self.call_state.binding
        if old is not None and old is not new and old in self.captured:
            raise BackendError(
                f"a CUDA graph has captured a call of this program with {old.source!r}, and would go on computing with "
                "that adapter after a swap. Capture calls of prog.bind(adapter), one graph for each adapter, or swap "
                "copy.copy(prog), of which no graph has captured a call"
            )

    def add_bound(self, bound: Any) -> None:
        """Make ``bound`` follow the program's limit on hoisted values from now on."""
        with self.lock:
            self.bound.add(bound)
            bound.set_hoist_limit(self.call_state.options.hoist_limit)

    def shared_executor(self, options: RunOptions, make: Callable[[], Executor]) -> Executor:
        """Return the code for calls with ``options`` other than the program's, shared by all bound callables; ``make``
        makes it."""
        with hold_graph_lock():
            made = self.bound_executors.get(options)
            if made is None:
                made = self.bound_executors[options] = make()
            return made
