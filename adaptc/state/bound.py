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
from adaptc.errors import AdaptcError, ConfigError, shown
from adaptc.passes.analysis.costs import at_sizes, example_sizes, node_work
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.optimize.sibling_cost import DISPATCH
from adaptc.passes.protocol.regions import node_tag
from adaptc.runtime.dynamo_boundary import outside
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.hoisted_values import Held
from adaptc.runtime.mutated_buffers import own_copies
from adaptc.runtime.options import RunOptions, check_limit
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merged
from adaptc.state.overrides import SCALE
from adaptc.tables import size

FORMS = ("apply", "weight", "auto")
#: share of the adapted layers' own work above which an adapter is worth weights of its own
SHARE = 0.05


@dataclass(frozen=True, eq=False)
class _Now:
    """The options, code and arguments that calls read, replaced as a whole; code and arguments are None until they are
    made."""

    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None


class Keeping(ABC):
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
    def adapted(self) -> bool:
        """Return whether it has an adapter at any site; the base has none."""
        return bool(self.binding.methods)

    def pinned(self, scale: Any = None) -> Callable[..., Any]:
        """Return the callable itself, which keeps its adapter already; programs return another one here.

        Raises ConfigError for a ``scale``: the callable has its own.
        """
        self._keeps(scale)
        return self

    def _keeps(self, scale: Any) -> None:
        if scale is not None:
            raise ConfigError(
                f"{SCALE}={shown(scale)}: what is bound keeps its adapter as it is; bind another, with "
                "program.bind(adapter, scale=...)"
            )


def program_of(runs: Any) -> Any:
    """Return the program, or the package, that ``runs`` is, or that it is bound to."""
    return getattr(runs, "program", runs)


class Bound(Keeping):
    """An adapter bound to a program, made by ``AdaptedProgram.bind``. ``form`` is the form that it takes, ``why`` the
    reason.

    It runs with the options that the program had when it was bound. Only the limit on hoisted values,
    :attr:`AdaptedProgram.hoist_limit`, follows the program.
    """

    def __init__(
        self,
        program: ProgramCore,
        adapter: Binding | None,
        form: str = "apply",
        memory_limit: int | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        binding = adapter or replace(Binding.none(), source="the base")
        self.program, self.binding = program, binding
        self.form, self.why = choose(program, binding, form, memory_limit)
        self._weights: tuple[Tensor, ...] = ()
        self._runs, self._reads = program, binding
        if self.form == "weight":
            self._runs, self._weights = own_weights(program, binding)
            self._reads = self._runs.current or Binding.none()
        ready = self._runs.ready()
        assert ready.executor is not None
        self._state = ready.executor.own_state(self._reads) if state is None else own_copies(state, state)
        self._now = _Now(ready.options, ready.executor, self._arguments(ready.executor))
        self._called = outside(_called)
        program.memory.join(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self, args, kwargs)

    def pinned_to(self, scale: Any = None) -> tuple[ProgramCore, Executor, Binding, Mapping[str, Tensor]]:
        """Return what calls run: the program, its code, the binding, and state that is not the program's."""
        self._keeps(scale)
        now = self.ready()
        assert now.executor is not None
        return self._runs, now.executor, self._reads, self._state

    @property
    def device(self) -> torch.device:
        return self.program.device

    def ready(self) -> _Now:
        """Return what calls read, with their code, which is made now if it was not."""
        while True:
            now = self._now
            if now.arguments is not None:
                return now
            executor = self._code(now.options)
            made = _Now(now.options, executor, self._arguments(executor))
            with self._runs.held_still():
                if self._now.options is now.options:
                    self._now = made
                    return made

    def _code(self, options: RunOptions) -> Executor:
        if options == self._runs.options:
            return self._runs.executor()
        twin = self._runs.with_options(**vars(options))
        return self._runs.memory.code(options, twin.executor)

    def _arguments(self, executor: Executor | None) -> Arguments | None:
        return None if executor is None else executor.own_arguments(self._reads, self._state)

    def limit(self, nbytes: int | None) -> None:
        """Set the limit, in bytes, on the hoisted values; a new limit frees those that are held. Called by its
        program."""
        if nbytes != self._now.options.hoist_limit:
            self._now = _Now(replace(self._now.options, hoist_limit=nbytes))
            if self._runs is not self.program:
                self._runs.set_options(hoist_limit=nbytes)  # its code holds hoisted values, too

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return FQN -> the tensor that calls write to in place (caches and statistics), which belongs to this callable
        alone."""
        return self._state

    @property
    def held(self) -> Held:
        """Return the memory that this binding holds: the weights of the weight form, and hoisted values.

        There are no hoisted values before the first call, nor between a change of :attr:`AdaptedProgram.hoist_limit`
        and the next call.
        """
        own = Held(len(self._weights), sum(t.nbytes for t in self._weights))
        arguments = self._now.arguments
        return own if arguments is None else own + arguments.held

    def __copy__(self) -> Bound:
        """Return another callable on the same tensors, whose buffers begin as the program's are now."""
        return Bound(self.program, self._adapter, self.form)

    @property
    def _adapter(self) -> Binding | None:
        return self.binding if self.binding.methods or self.binding.values else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """Return a callable with tensors of its own, whose buffers continue from what this one's calls wrote."""
        program, adapter = copy.deepcopy(self.program, memo), copy.deepcopy(self._adapter, memo)
        return Bound(program, adapter, self.form, state=self._state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "what is bound to a program cannot be pickled: write the program with adaptc.save and the adapter with "
            "adaptc.save_adapter, and bind it again where they are read"
        )

    def __repr__(self) -> str:
        memory = f", {size(self.held.nbytes)} of weights" if self._weights else ""
        return f"Bound({self.binding.source!r}, {len(self.binding.methods)} sites, {self.form} form{memory})"


def _called(bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    now = bound.ready()
    return now.executor(now.arguments, args, kwargs)  # type: ignore[misc]


@exclusive
def own_weights(program: ProgramCore, binding: Binding) -> tuple[ProgramCore, tuple[Tensor, ...]]:
    """Return the base's program on the weights that ``binding`` makes, and those weights; all others are shared."""
    made, _ = merged(program.with_binding(binding))
    shared = {storage_key(t) for t in program.base_tensors.values() if isinstance(t, Tensor)}
    new = {f: t for f, t in made.state_dict.items() if isinstance(t, Tensor) and storage_key(t) not in shared}
    # Fused siblings move into one buffer. Weights that are shared with the program must stay where they are.
    made.set_options(fuse=frozenset(new))
    return made, tuple({storage_key(t): t for t in new.values()}.values())


def choose(program: ProgramCore, binding: Binding, form: str, limit: int | None) -> tuple[str, str]:
    """Return the form for ``binding``, and why.

    Raises ConfigError for a form that does not exist, and for a limit that is no number of bytes.
    """
    if not isinstance(form, str) or form not in FORMS:
        raise ConfigError(f"form={shown(form)} is not one of {', '.join(FORMS)}")
    check_limit(limit, "memory_limit")
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
    if limit is not None and needed > limit:
        return "apply", f"its own weights would take {needed:,} bytes, over the limit of {limit:,}"
    share = overhead(program)
    if share <= SHARE:
        return "apply", f"the adapter costs {share:.1%} of the adapted layers' own work"
    return "weight", f"the adapter would cost {share:.1%} of the adapted layers' own work in every call"


@exclusive
@torch.no_grad()
def overhead(program: ProgramCore) -> float:
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
    work = [sum(at_sizes(node_work(n), sizes) for n in nodes) + DISPATCH * len(nodes) for nodes in (regions, base)]
    return float(work[0] / work[1]) if base else 0.0
