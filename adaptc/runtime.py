"""The runtime: calls the lifted graph with base tensors, one binding's tensors and the user's inputs.

Slots are inputs of the graph, so a swap is a change of arguments: nothing is copied, nothing is compiled again, and a
call that has begun keeps the binding it began with. An :class:`Executor` holds the code of one program; it has no state
that a call changes, but for values that are computed once per binding (see ``hoisting``).

Private torch use, with the public route that was tried:
- ``torch.utils._pytree``: the exported program's input and output specs are its TreeSpecs; no public module reads them.
- ``torch._dynamo.utils.counters``/``compile_times`` and inductor's metrics: the only counts of compilations.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from adaptc.binding import Binding
from adaptc.errors import AdaptcError, BackendError, RecompileError
from adaptc.hoisting import Code, Prefix, Shared
from adaptc.passes._kinds import Op
from adaptc.passes._lifted import Lifted, storage_key
from adaptc.passes._method import Attachment
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
        self._split(hoist_limit)
        self._compiled: Callable[..., Any] | None = None
        self._prefixes: WeakKeyDictionary[Binding, Prefix] = WeakKeyDictionary()

    def _split(self, limit: int | None) -> None:
        """Take out of the graph what is computed once: of the base for all bindings, of the slots for one that is not
        trained. A program that trains holds nothing of its slots."""
        mutated = {storage_key(self._base[n]) for _, n in self._mutated if n is not None}
        index = dict(zip(self._lifted_names, self._names, strict=True))
        slots = {f for a in self.attachments for f in (*a.slots.values(), a.scale)}
        base = {
            index[n]
            for n, t in self._base.items()
            if n not in slots and isinstance(t, Tensor) and storage_key(t) not in mutated
        }
        frozen = set() if self._training else {index[f] for f in slots if f in index}
        self.code = Code(self.module, self._names, base, frozen, limit, self.backend == "inductor")
        self._shared = Shared(self.code.stages[0]) if self.code.stages else None

    def prefix(self, binding: Binding) -> Prefix:
        """The inputs of the graph for one binding, but for the user's; made once per binding."""
        with self._binding:
            made = self._prefixes.get(binding)
            if made is None:
                made = self._prefixes[binding] = self._make_prefix(binding)
            return made

    def _make_prefix(self, binding: Binding) -> Prefix:
        values: list[Any] = []
        for name in self._lifted_names:
            value = binding.values.get(name, binding.base.get(name, self._base.get(name)))  # type: ignore[arg-type]
            values.append(value)
        moving = any(values[i].requires_grad for i in self.code.slot_inputs)
        if not self.differentiable:
            values = [v.detach() if isinstance(v, Tensor) else v for v in values]
        lay: Callable[[list[Any]], list[Any]] = list
        if self.backend == "inductor":
            from adaptc.inductor import with_room

            names, training = self._lifted_names, self._training
            lay = partial(with_room, names=names, attachments=self.attachments, ops=self.ops, training=training)
        own = any(self._lifted_names[i] in binding.base for i in self.code.base_inputs)
        return Prefix(self.code, values, lay, moving, None if own else self._shared)

    def __call__(self, prefix: Prefix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = self._inputs(args, kwargs)
        if self.backend == "inductor":
            code = self._compiled or self.compile()
            with torch.no_grad():
                out = code(*prefix.values(), *flat)
        elif self.code.autocast():
            out = self.module(*prefix.lifted, *flat)
        else:
            out = self.code.main(*prefix.values(), *flat)
        for i, name in self._mutated:
            with torch.no_grad():
                self._base[name].copy_(out[i])  # type: ignore[index]
        return pytree.tree_unflatten([out[i] for i in self._user_outs], self._out_spec)

    def compile(self) -> Callable[..., Any]:
        """Compile now instead of at the first call."""
        with self._compiling:
            if self._compiled is None:
                from adaptc.inductor import compile_lifted

                targets = dict(zip(self._names, self._lifted_names, strict=True))
                self._compiled = compile_lifted(self.module, self.code, targets, self.attachments, self.ops)
            return self._compiled


@dataclass(frozen=True)
class TensorInput:
    """What a tensor input must look like. A size is a number, or the name of the symbol it was captured as."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


class Inputs:
    """Flattens and checks the arguments of a call.

    ``expected`` has a :class:`TensorInput` or a constant for every flat input, by name; ``ranges`` the least and the
    greatest size of each symbol.
    """

    def __init__(
        self,
        spec: pytree.TreeSpec,
        fills: Mapping[str, Sequence[str]],
        expected: Sequence[tuple[str, Any]],
        ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        self.spec, self.fills, self.expected, self.ranges = spec, fills, expected, ranges
        args_spec, kwargs_spec = spec.children()
        self.n_args = len(args_spec.children())
        self.names: list[str] = list(kwargs_spec.context or ())
        self.plain = all(c.is_leaf() for c in (*args_spec.children(), *kwargs_spec.children()))
        self._seen: set[Any] = set()

    @classmethod
    def of(cls, program: ExportedProgram, fills: Mapping[str, Sequence[str]]) -> Inputs:
        """The inputs a program was captured with."""
        spec = program.call_spec.in_spec
        if spec is None:
            raise AdaptcError("the program has no input spec; export it with torch.export.export")
        nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
        expected: list[tuple[str, Any]] = []
        for s in program.graph_signature.input_specs:
            if s.kind == InputKind.USER_INPUT:
                value = s.arg.value if isinstance(s.arg, ConstantArgument) else nodes[s.arg.name].meta["val"]
                if isinstance(value, Tensor):
                    value = TensorInput(value.dtype, tuple(n if isinstance(n, int) else str(n) for n in value.shape))
                expected.append((s.arg.name, value))
        ranges = {str(k): (float(v.lower), float(v.upper)) for k, v in program.range_constraints.items()}
        return cls(spec, fills, expected, ranges)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(kwargs) != len(self.names) or len(args) != self.n_args:
            kwargs = self._complete(args, kwargs)
        try:
            ordered = {n: kwargs[n] for n in self.names}
        except KeyError as missing:
            raise AdaptcError(self._usage(f"input {missing} is missing")) from None
        flat = [*args, *ordered.values()] if self.plain else self._flatten(args, ordered)
        key = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in flat)
        if key not in self._seen:
            self._check(flat)
            if len(self._seen) < 4096:
                self._seen.add(key)
        return flat

    def _complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        extra = [n for n in kwargs if n not in self.names]
        if extra or len(args) != self.n_args:
            raise AdaptcError(self._usage(f"got {len(args)} positional inputs and {sorted(kwargs)}"))
        done = dict(kwargs)
        for name in self.names:
            if name not in done and name in self.fills and self.fills[name][1] in done:
                how, like = self.fills[name]
                done[name] = fill(how, done[like])
        return done

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise AdaptcError(self._usage(f"the inputs have another structure: {spec}"))
        return flat

    def _usage(self, what: str) -> str:
        optional = [n for n in self.names if n in self.fills]
        return (
            f"{what}. The program takes {self.n_args} positional inputs and the keywords {self.names}"
            + (f" ({optional} may be left out)" if optional else "")
            + ", as it was captured; capture with other example_inputs to change that."
        )

    def _check(self, flat: Sequence[Any]) -> None:
        """Sizes and dtypes the graph was specialised on; anything else would compute nonsense or fail far inside."""
        sizes: dict[str, tuple[int, str]] = {}
        if len(flat) != len(self.expected):
            raise AdaptcError(self._usage(f"got {len(flat)} inputs, expected {len(self.expected)}"))
        for value, (name, want) in zip(flat, self.expected, strict=True):
            if not isinstance(want, TensorInput):
                if isinstance(want, (int, float, bool, str, type(None))) and value != want:
                    raise AdaptcError(
                        f"input {name!r} was captured as the constant {want!r}, got {value!r}; capture again"
                    )
                continue
            if not isinstance(value, Tensor):
                raise AdaptcError(f"input {name!r} must be a tensor, got {type(value).__name__}")
            if value.dtype != want.dtype or value.ndim != len(want.shape):
                wanted = f"{want.dtype} with {len(want.shape)} axes"
                raise AdaptcError(f"input {name!r}: expected {wanted}, got {value.dtype} with {value.ndim}")
            for axis, (got, size) in enumerate(zip(value.shape, want.shape, strict=True)):
                self._check_size(name, axis, got, size, sizes)

    def _check_size(self, name: str, axis: int, got: int, size: int | str, sizes: dict[str, tuple[int, str]]) -> None:
        if isinstance(size, int):
            if got != size:
                raise AdaptcError(
                    f"input {name!r}: axis {axis} has size {got}, but the program was captured for exactly {size}; "
                    "capture with dynamic_shapes that leave this axis free"
                )
            return
        where = f"axis {axis} of {name!r}"
        if size in sizes and sizes[size][0] != got:
            raise AdaptcError(f"{where} has size {got}, but must equal {sizes[size][1]}, which has {sizes[size][0]}")
        sizes.setdefault(size, (got, where))
        low, high = self.ranges.get(size, (0, inf))
        if not low <= got <= high:
            raise AdaptcError(f"{where} has size {got}, outside the captured range [{low:g}, {high:g}]")


def fill(how: str, like: Tensor) -> Tensor:
    """A keyword input that was left out, made from another one; the rules are those of ``Captured.fills``."""
    if how == "ones_like":
        return torch.ones_like(like)
    shape = like.shape if how == "ignore_like" else like.shape[:1]
    return torch.full(shape, -100, dtype=torch.int64, device=like.device)


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
