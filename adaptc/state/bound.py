"""Bind one adapter to a program: a callable that keeps it, whatever the program is swapped to.

It takes one of two forms, which compute the same up to rounding:

    apply    the program's own code with this adapter's tensors: no memory but theirs
    weight   the base's graph on weights of its own, W' = weight(W) made once: as fast as the base, and as large, over
             the adapted weights

``auto`` takes the weight form where three things hold. The adapter would cost a call more than a twentieth of the
adapted layers' own work (symbolic, at the sizes of the example inputs). The weights fit a memory limit. They are not in
half precision, where rounding W' once is not what the program does.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.passes.analysis.costs import count_node_operations, evaluate_at_sizes, example_sizes
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.optimize.sibling_cost import DISPATCH
from adaptc.passes.protocol.regions import node_tag
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.hoisted_values import HoistedMemory
from adaptc.runtime.mutated_buffers import copy_sharing_memory
from adaptc.runtime.options import RunOptions, check_byte_limit
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merge_program
from adaptc.tables import format_bytes

FORMS = ("apply", "weight", "auto")
#: share of the adapted layers' own work above which an adapter is worth weights of its own
MAX_OVERHEAD_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class _CallState:
    """The options, code and arguments that calls read, replaced as a whole; code and arguments are None until they are
    made."""

    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None


class PinnedRunner(ABC):
    """A callable that keeps one adapter, whatever its program is swapped to."""

    #: the adapter that calls use
    binding: Any

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return the device that it runs on."""

    @property
    def has_adapter(self) -> bool:
        """Return whether it has an adapter at any site; the base has none."""
        return bool(self.binding.methods)

    def snapshot_call(self) -> Callable[..., Any]:
        """Return the callable itself, which keeps its adapter already; programs return another one here."""
        return self


def program_of(runner: Any) -> Any:
    """Return the program, or the package, that ``runner`` is, or that it is bound to."""
    return getattr(runner, "program", runner)


class BoundProgram(PinnedRunner):
    """An adapter bound to a program, made by ``AdaptedProgram.bind``. ``form`` is the form that it takes, ``why`` the
    reason.

    It runs with the options that the program had when it was bound. Only the limit on hoisted values,
    :attr:`AdaptedProgram.hoist_limit`, follows the program.

    Example:
        >>> bound = prog.bind(lora_weights(seed=1)[1])
        >>> bound(x).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        program: ProgramCore,
        adapter: Binding | None,
        form: str = "apply",
        memory_limit: int | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        binding = adapter or replace(Binding.empty(), source="the base")
        self.program, self.binding = program, binding
        self.form, self.why = choose_form(program, binding, form, memory_limit)
        self._own_weights: tuple[Tensor, ...] = ()
        self._run_program, self._run_binding = program, binding
        if self.form == "weight":
            self._run_program, self._own_weights = make_own_weights(program, binding)
            self._run_binding = self._run_program.current or Binding.empty()
        ready = self._run_program.compiled_state()
        assert ready.executor is not None
        self._state = (
            ready.executor.copy_written_tensors(self._run_binding)
            if state is None
            else copy_sharing_memory(state, state)
        )
        self._call_state = _CallState(ready.options, ready.executor, self._make_arguments(ready.executor))
        self._untraced_call = not_traced(_call)
        program.run_state.add_bound_program(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._untraced_call(self, args, kwargs)

    def snapshot_executor(self) -> tuple[ProgramCore, Executor, Binding, Mapping[str, Tensor]]:
        """Return what calls run: the program, its code, the binding, and state that is not the program's."""
        now = self.compiled_state()
        assert now.executor is not None
        return self._run_program, now.executor, self._run_binding, self._state

    @property
    def device(self) -> torch.device:
        """Return the device that it runs on."""
        return self.program.device

    def compiled_state(self) -> _CallState:
        """Return what calls read, with their code, which is made now if it was not."""
        while True:
            now = self._call_state
            if now.arguments is not None:
                return now
            executor = self._find_executor(now.options)
            made = _CallState(now.options, executor, self._make_arguments(executor))
            with self._run_program.swap_lock():
                if self._call_state.options is now.options:
                    self._call_state = made
                    return made

    def _find_executor(self, options: RunOptions) -> Executor:
        if options == self._run_program.options:
            return self._run_program.executor()
        twin = self._run_program.with_options(**vars(options))
        return self._run_program.run_state.shared_executor(options, twin.executor)

    def _make_arguments(self, executor: Executor | None) -> Arguments | None:
        return None if executor is None else executor.arguments_with_state(self._run_binding, self._state)

    def set_hoist_limit(self, nbytes: int | None) -> None:
        """Set the limit, in bytes, on the hoisted values; a new limit frees those that are held. Called by its
        program."""
        if nbytes != self._call_state.options.hoist_limit:
            self._call_state = _CallState(replace(self._call_state.options, hoist_limit=nbytes))
            if self._run_program is not self.program:
                self._run_program.set_options(hoist_limit=nbytes)  # its code holds hoisted values, too

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return FQN -> the tensor that calls write to in place (caches and statistics), which belongs to this callable
        alone."""
        return self._state

    @property
    def held(self) -> HoistedMemory:
        """Return the memory that this binding holds: the weights of the weight form, and hoisted values.

        There are no hoisted values before the first call, nor between a change of :attr:`AdaptedProgram.hoist_limit`
        and the next call.
        """
        own = HoistedMemory(len(self._own_weights), sum(t.nbytes for t in self._own_weights))
        arguments = self._call_state.arguments
        return own if arguments is None else own + arguments.hoisted_memory

    def __copy__(self) -> BoundProgram:
        """Return another callable on the same tensors, whose buffers begin as the program's are now."""
        return BoundProgram(self.program, self._adapter_or_none, self.form)

    @property
    def _adapter_or_none(self) -> Binding | None:
        return self.binding if self.binding.methods or self.binding.values else None

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProgram:
        """Return a callable with tensors of its own, whose buffers continue from what this one's calls wrote."""
        program, adapter = copy.deepcopy(self.program, memo), copy.deepcopy(self._adapter_or_none, memo)
        return BoundProgram(program, adapter, self.form, state=self._state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "what is bound to a program cannot be pickled: write the program with adaptc.save and the adapter with "
            "adaptc.save_adapter, and bind it again where they are read"
        )

    def __repr__(self) -> str:
        memory = f", {format_bytes(self.held.nbytes)} of weights" if self._own_weights else ""
        return f"Bound({self.binding.source!r}, {len(self.binding.methods)} sites, {self.form} form{memory})"


def _call(bound: BoundProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    now = bound.compiled_state()
    return now.executor(now.arguments, args, kwargs)  # type: ignore[misc]


@with_graph_lock
def make_own_weights(program: ProgramCore, binding: Binding) -> tuple[ProgramCore, tuple[Tensor, ...]]:
    """Return the base's program on the weights that ``binding`` makes, and those weights; all others are shared."""
    made, _ = merge_program(program.with_binding(binding))
    shared = {storage_key(t) for t in program.base_tensors.values() if isinstance(t, Tensor)}
    new = {f: t for f, t in made.state_dict.items() if isinstance(t, Tensor) and storage_key(t) not in shared}
    # Fused siblings move into one buffer. Weights that are shared with the program must stay where they are.
    made.set_options(fuse=frozenset(new))
    return made, tuple({storage_key(t): t for t in new.values()}.values())


def choose_form(program: ProgramCore, binding: Binding, form: str, memory_limit: int | None) -> tuple[str, str]:
    """Return the form for ``binding``, and why.

    Raises ConfigError for a form that does not exist, and for a limit that is no number of bytes.
    """
    if not isinstance(form, str) or form not in FORMS:
        raise ConfigError(f"form={short_repr(form)} is not one of {', '.join(FORMS)}")
    check_byte_limit(memory_limit, "memory_limit")
    if not program.adaptation.attachments:
        return "apply", "the base has no adapter"
    if form != "auto":
        return form, "asked for"
    adapted = [a for a in program.adaptation.attachments if a.id in binding.methods]
    weights = {a.fqn: program.base_tensors[a.fqn] for a in adapted}
    if any(a.method.check_merge(program.ops[a.id]) for a in adapted):
        return "apply", "a method of the adapter has no form on the weight"
    if any(t.is_floating_point() and t.itemsize < 4 for t in weights.values()):
        return "apply", "weights in half precision would round the change"
    needed = sum(t.nbytes for t in weights.values())
    if memory_limit is not None and needed > memory_limit:
        return "apply", f"its own weights would take {needed:,} bytes, over the limit of {memory_limit:,}"
    share = region_overhead(program)
    if share <= MAX_OVERHEAD_SHARE:
        return "apply", f"the adapter costs {share:.1%} of the adapted layers' own work"
    return "weight", f"the adapter would cost {share:.1%} of the adapted layers' own work in every call"


@with_graph_lock
@torch.no_grad()
def region_overhead(program: ProgramCore) -> float:
    """Return the work of a program's regions over that of the layers they stand at, for one call at the example sizes.

    It is 0 where the regions stand at no such layer.
    """
    program = program.snapshot()
    graph, sizes = program.graph, example_sizes(program)
    layers = {name for a in program.adaptation.attachments for name in a.consumers}
    regions, base = [], []
    for node in graph.nodes:
        if node.op == "call_function":
            (regions if node_tag(node) else base if node.name in layers else []).append(node)
    work = [
        sum(evaluate_at_sizes(count_node_operations(n), sizes) for n in nodes) + DISPATCH * len(nodes)
        for nodes in (regions, base)
    ]
    return float(work[0] / work[1]) if base else 0.0
