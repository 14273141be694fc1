"""The runtime: calls the lifted graph with base tensors, one binding's tensors and the user's inputs.

Slots are inputs of the graph, so a swap is a change of arguments: nothing is copied, nothing is compiled again, and a
call that has begun keeps the binding it began with. An :class:`Executor` holds the code of one program; it has no state
that a call changes, but for values that are computed once per binding (see ``hoisting``).

Private torch use, with the public route that was tried:
- ``torch.utils._pytree``: the exported program's output spec is a TreeSpec of it; no public module reads them.
- ``torch._dynamo.utils.counters``/``compile_times`` and inductor's metrics: the only counts of compilations.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from adaptc.binding import Binding
from adaptc.errors import AdaptcError, BackendError, RecompileError
from adaptc.fusing import PLAIN, Codes, Fusion, sizes_of
from adaptc.hoisting import Held, Prefix
from adaptc.inputs import Inputs
from adaptc.lowering import LoweredCodes, runs_on_gpu
from adaptc.packing import pack, packable
from adaptc.passes._kinds import Op
from adaptc.passes._lifted import Lifted, storage_key
from adaptc.passes._method import Attachment
from adaptc.passes.choose_forms import example_sizes
from adaptc.passes.set_mode import set_mode

BACKENDS = ("eager", "inductor")


def check_backend(backend: str) -> None:
    """Raises BackendError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")


class Executor:
    """The callable code of a program. ``fills`` says how keyword inputs that were left out are made."""

    def __init__(
        self,
        program: ExportedProgram,
        attachments: Sequence[Attachment],
        ops: Mapping[str, Op],
        backend: str = "eager",
        fills: Mapping[str, Sequence[str]] | None = None,
        training: bool = False,
        originals: Mapping[str, Tensor] | None = None,
        hoist_limit: int | None = None,
        fuse: bool | Collection[str] = True,
        kernels: bool | None = None,
    ) -> None:
        check_backend(backend)
        self.backend, self.attachments, self.ops = backend, attachments, ops
        self.fills = dict(fills or {})
        self.lifted = Lifted(program)
        self.module = fx.GraphModule(program.graph_module, self.lifted.graph)
        if training:
            set_mode(self.module, False)
        self.differentiable = training and backend == "eager"
        signature = program.graph_signature
        self._lifted_names = [s.target for s in signature.input_specs if s.kind != InputKind.USER_INPUT]
        # The state holds what the current adapter made of the base; other bindings start from the base itself.
        self._base = {n: self.lifted.tensor(n) for n in self._lifted_names if n is not None} | dict(originals or {})
        self._inputs = Inputs.of(program, self.fills)
        spec = program.call_spec.out_spec
        if spec is None:
            raise AdaptcError("the program has no output spec; export it with torch.export.export")
        self._out_spec = spec
        outs = signature.output_specs
        self._mutated = [
            (i, s.target)
            for i, s in enumerate(outs)
            if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        ]
        self._user_outs = [i for i, s in enumerate(outs) if s.kind == OutputKind.USER_OUTPUT]
        self._names = [s.arg.name for s in signature.input_specs if s.kind != InputKind.USER_INPUT]
        self._compiling, self._binding = threading.Lock(), threading.Lock()
        self._training = training
        self._codes = self._split(hoist_limit, fuse, kernels)
        self._where = self._inputs.where()
        self.fixed_kind = PLAIN if training else self._codes.kind(example_sizes(program))
        self._compiled: Callable[..., Any] | None = None
        self._arguments: WeakKeyDictionary[Binding, Arguments] = WeakKeyDictionary()

    def _split(self, limit: int | None, fuse: bool | Collection[str], kernels: bool | None) -> Codes:
        """What is frozen: of the base for all bindings, of the slots for one that is not trained. A program that trains
        holds nothing of its slots."""
        mutated = {storage_key(self._base[n]) for _, n in self._mutated if n is not None}
        index = dict(zip(self._lifted_names, self._names, strict=True))
        slots = {f for a in self.attachments for f in (*a.slots.values(), a.scale)}
        tensors = {n: t for n, t in self._base.items() if n not in slots and isinstance(t, Tensor)}
        base = {index[n] for n, t in tensors.items() if storage_key(t) not in mutated}
        names = tensors if isinstance(fuse, bool) else fuse
        free = {index[n] for n, t in tensors.items() if n in names and packable(t)} & base
        frozen = set() if self._training else {index[f] for f in slots if f in index}
        compiled = self.backend == "inductor"
        made = (self.module, self._names, base, frozen, free, limit, compiled, bool(fuse), self._training)
        wanted = runs_on_gpu(tensors.values()) if kernels is None else kernels
        if not wanted or not self.attachments:
            return Codes(*made)
        return LoweredCodes(*made, attachments=self.attachments, ops=self.ops, placeholders=index)

    @property
    def fusion(self) -> Fusion:
        """Which layers share a product."""
        return self._codes.fusion

    def arguments(self, binding: Binding) -> Arguments:
        """The inputs of the graph for one binding, but for the user's; made once per binding."""
        with self._binding:
            made = self._arguments.get(binding)
            if made is None:
                made = self._arguments[binding] = Arguments(self, binding)
            return made

    def prefix(self, values: Sequence[Any], own: Collection[str], kind: str) -> Prefix:
        """What one kind of code takes for ``values`` of the lifted inputs, of which those called ``own`` are of a base
        that only this binding has."""
        variant, names = self._codes.get(kind), self._names
        at = {n: i for i, n in enumerate(names)}
        differ = {i for i, n in enumerate(self._lifted_names) if n in own}
        packed = []
        for p in variant.packs:
            members = [at[m] for m in p.members]
            if differ.isdisjoint(members):
                packed.append(pack([self._base[self._lifted_names[i]] for i in members]))  # type: ignore[index]
            else:
                packed.append(torch.cat([values[i].detach() for i in members]))
                differ.add(len(names) + len(packed) - 1)
        values = [*values, *packed]
        moving = any(values[i].requires_grad for i in variant.code.slot_inputs)
        values = self.detached(values)
        lay: Callable[[list[Any]], list[Any]] = list
        if self.backend == "inductor":
            from adaptc.inductor import with_room

            everything = [*self._lifted_names, *(p.name for p in variant.packs)]
            lay = partial(
                with_room, names=everything, attachments=self.attachments, ops=self.ops, training=self._training
            )
        shared = variant.shared if differ.isdisjoint(variant.code.base_inputs) else None
        return Prefix(variant.code, values, lay, moving, shared)

    def detached(self, values: Sequence[Any]) -> list[Any]:
        if self.differentiable:
            return list(values)
        # A tensor that wants no gradient stays the object it is: where its memory moves, so must what a call reads.
        return [v.detach() if isinstance(v, Tensor) and v.requires_grad else v for v in values]

    def __call__(self, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = self._inputs(args, kwargs)
        if self.backend == "inductor":
            code = self._compiled or self.compile()
            with torch.no_grad():
                out = code(*arguments.get(self.fixed_kind).values(), *flat)
        elif any(map(torch.is_autocast_enabled, self._codes.devices)):
            # The caller has casts of its own on, which nothing was fused or held with.
            out = self.module(*arguments.lifted, *flat)
        else:
            kind = PLAIN if arguments.moving else self._codes.kind(sizes_of(flat, self._where))
            out = self._codes.get(kind).call(*arguments.get(kind).values(), *flat)
        for i, name in self._mutated:
            with torch.no_grad():
                self._base[name].copy_(out[i])  # type: ignore[index]
        return pytree.tree_unflatten([out[i] for i in self._user_outs], self._out_spec)

    def compile(self) -> Callable[..., Any]:
        """Compile now instead of at the first call."""
        with self._compiling:
            if self._compiled is None:
                from adaptc.inductor import compile_lifted

                variant = self._codes.get(self.fixed_kind)
                targets: dict[str, str | None] = {p.name: None for p in variant.packs}
                targets.update(zip(self._names, self._lifted_names, strict=True))
                code = variant.code
                self._compiled = compile_lifted(code.module, code, targets, self.attachments, self.ops)
            return self._compiled


class Arguments:
    """What one binding gives to each code of a program, made when that code is first called with it."""

    def __init__(self, executor: Executor, binding: Binding) -> None:
        # Weak: the executor knows it too, and what gives up a base must not wait for a garbage collection.
        self._executor = ref(executor)
        self._own = frozenset(binding.base)
        known: Mapping[Any, Any] = {**executor._base, **binding.base, **binding.values}
        self._values = [known[n] for n in executor._lifted_names]
        self._prefixes: dict[str, Prefix] = {}
        self._lock = threading.Lock()
        #: whether adapter tensors may change at any time
        self.moving = any(v.requires_grad for v in binding.values.values())

    @property
    def executor(self) -> Executor | None:
        """The one it was made for; whoever calls with it holds that."""
        return self._executor()

    def get(self, kind: str) -> Prefix:
        """The prefix for one kind of code."""
        found = self._prefixes.get(kind)
        if found is None:
            with self._lock:
                found = self._prefixes.get(kind)
                if found is None:
                    found = self._prefixes[kind] = self._owner().prefix(self._values, self._own, kind)
        return found

    @property
    def lifted(self) -> list[Any]:
        """The inputs of the graph as it was captured."""
        return self._owner().detached(self._values)

    def _owner(self) -> Executor:
        executor = self._executor()
        assert executor is not None
        return executor

    @property
    def held(self) -> Held:
        """What is computed once for the binding, for all codes it was called with."""
        return sum((p.held for p in self._prefixes.values()), Held())


def compile_count() -> int:
    """How many graphs torch has compiled in this process (Dynamo frames, AOTAutograd graphs, Inductor graphs)."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    aot = counters["aot_autograd"]["total"] + counters["aot_autograd"]["ok"]
    return counters["stats"]["unique_graphs"] + aot + metrics.generated_kernel_count


@contextlib.contextmanager
def assert_no_recompiles() -> Iterator[None]:
    """Context manager: raises RecompileError if anything was compiled inside, by Dynamo, AOTAutograd or Inductor.

    Counts torch's own counters, so it also catches a ``torch.compile`` that is not adaptc's. Usable as a decorator.
    """
    before = compile_count()
    yield
    made = compile_count() - before
    if made:
        raise RecompileError(f"{made} compilations took place in a block that promised none")
