"""Flatten the arguments of a call as the graph takes them, and check them against the sizes of the capture.

An error says which input is wrong and what would fit. Shapes and dtypes that passed once are remembered, so later calls
with the same ones are not checked again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import AdaptcError, listing
from adaptc.passes.graph.lifted import guards_of, user_inputs
from adaptc.passes.graph.pytree import pytree
from adaptc.runtime.calls.call_names import CallNames
from adaptc.runtime.calls.output_form import OutputForm
from adaptc.runtime.calls.size_conditions import condition, expression, solved, symbols

#: the start of the rule for an input that an adapter added; the number that fills it follows
FULL_LIKE = "full_like:"
#: the start of the rule for labels that are no classes; their dtype and the sizes of a row follow
NAN_ROWS = "nan_rows:"
_FLOATS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
NOT_LONGER: Mapping[str, int] = MappingProxyType({})

#: the most characters of a condition that a message shows
_LONGEST = 240


@dataclass(frozen=True)
class TensorInput:
    """The dtype and shape that a tensor input must have.

    A size is a number, the name of a symbol (any size in its range), or an expression over symbols such as ``2*s7``.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]


class Inputs:
    """The inputs of a program: an object that is called with a call's arguments and returns them flat and checked.

    ``spec`` is the tree of (args, kwargs). ``fills`` gives the rules for keyword inputs that may be left out.
    ``expected`` has the name of every flat input, with a :class:`TensorInput` or the constant it was captured as.
    ``ranges`` has the least and the greatest size of each symbol. ``guards`` are the other conditions that torch
    assumed of sizes in the capture. ``takes`` is as for :class:`CallNames`. ``gives`` is the tree of the outputs.
    """

    def __init__(
        self,
        spec: pytree.TreeSpec,
        fills: Mapping[str, Sequence[str]],
        expected: Sequence[tuple[str, Any]],
        ranges: Mapping[str, tuple[float, float]],
        guards: Sequence[str] = (),
        takes: Sequence[str] = (),
        gives: pytree.TreeSpec | None = None,
    ) -> None:
        self.spec, self.fills, self.expected, self.ranges = spec, fills, expected, ranges
        self.guards, self.takes = tuple(guards), tuple(takes)
        args_spec, kwargs_spec = spec.children()
        self.n_args = len(args_spec.children())
        self.names: list[str] = list(kwargs_spec.context or ())
        children = (*args_spec.children(), *kwargs_spec.children())
        self.plain = all(c.is_leaf() for c in children)
        flat = [name for name, _ in expected]
        constants = {n: want for n, want in expected if not isinstance(want, TensorInput)} if self.plain else {}
        positional = [*self.takes[: self.n_args], *(f"input_{i}" for i in range(len(self.takes), self.n_args))]
        self.calls = CallNames(positional, self.names, self.takes, fills, constants, OutputForm.of(gives))
        self._conditions = [c for g in self.guards if (c := condition(g, flat)) is not None]
        self._seen: set[Any] = set()

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        fills: Mapping[str, Sequence[str]],
        takes: Sequence[str] | None = None,
        free: Collection[tuple[str, int]] = (),
    ) -> Inputs:
        """Return the inputs that a program was captured with.

        ``free`` has the (name, axis) of sizes that may differ although they were captured as numbers. Raises
        AdaptcError for a program without an input spec.
        """
        spec = program.call_spec.in_spec
        if spec is None:
            raise AdaptcError("the program has no input spec; export it with torch.export.export")
        expected: list[tuple[str, Any]] = []
        for name, value in user_inputs(program).items():
            if isinstance(value, Tensor):
                sizes = (f"free_{name}_{i}" if (name, i) in free else n for i, n in enumerate(value.shape))
                value = TensorInput(value.dtype, tuple(n if isinstance(n, int) else str(n) for n in sizes))
            expected.append((name, value))
        ranges = {str(k): (float(v.lower), float(v.upper)) for k, v in program.range_constraints.items()}
        return cls(
            spec, fills, expected, ranges, guards_of(program), takes or first_names(program), program.call_spec.out_spec
        )

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], longer: Mapping[str, int] = NOT_LONGER
    ) -> list[Any]:
        """Return the arguments as a flat list; raise AdaptcError for those that do not fit.

        ``longer`` maps a free size to the number of virtual tokens that an adapter adds to it inside the graph.
        """
        if len(kwargs) != len(self.names) or len(args) != self.n_args or not self.calls.as_captured(kwargs):
            args, kwargs = self.complete(args, kwargs)
        ordered = {n: kwargs[n] for n in self.names}
        flat = [*args, *ordered.values()] if self.plain else self._flatten(args, ordered)
        key = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in flat)
        if longer:
            key = (*key, *longer.items())
        try:
            seen = key in self._seen
        except TypeError:  # unhashable: a list or an array in the place of a tensor, which the check refuses
            self._check(flat, longer)
            return flat
        if not seen:
            self._check(flat, longer)
            if len(self._seen) < 4096:
                self._seen.add(key)
        return flat

    def where(self) -> dict[str, tuple[int, int]]:
        """Return free size -> the (flat input, axis) that has it."""
        out: dict[str, tuple[int, int]] = {}
        for i, (_, want) in enumerate(self.expected):
            sizes = want.shape if isinstance(want, TensorInput) else ()
            out |= {n: (i, axis) for axis, n in enumerate(sizes) if isinstance(n, str) and n.isidentifier()}
        return out

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as the program was captured, with the keyword inputs that were left out filled in.

        Raises AdaptcError for an input that the program does not take, and for one that is missing.
        """
        args, done = self.calls.arranged(args, kwargs)
        for name in self.names:
            if name not in done:
                how, like = self.fills[name]
                if like not in done:
                    raise AdaptcError(self._usage(f"input {like!r} is missing"))
                if not isinstance(done[like], Tensor):
                    raise AdaptcError(self.calls.not_a_tensor(like, done[like]))
                done[name] = fill(how, done[like])
        return args, done

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            places = zip(
                (*args, *kwargs.values()), [c for s in self.spec.children() for c in s.children()], strict=True
            )
            for name, (value, meant) in zip((*self.calls.positional, *self.names), places, strict=True):
                if meant.is_leaf() and value is not None and isinstance(value, (list, tuple, Mapping)):
                    raise AdaptcError(self.calls.not_a_tensor(name, value))
            raise AdaptcError(self._usage(f"the inputs have another structure: {spec}"))
        return flat

    def _usage(self, what: str) -> str:
        return f"{what}. {self.calls.usage()}"

    def _check(self, flat: Sequence[Any], longer: Mapping[str, int]) -> None:
        """Raise AdaptcError for sizes and dtypes that the graph was not captured for.

        They would compute nonsense, or fail deep inside the graph. ``longer``: as for :meth:`__call__`.
        """
        sizes: dict[str, tuple[int, str]] = {}
        made: list[tuple[str, int, int, str]] = []
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
                raise AdaptcError(self.calls.not_a_tensor(name, value))
            if value.dtype != want.dtype or value.ndim != len(want.shape):
                wanted = f"{want.dtype} with {len(want.shape)} axes"
                raise AdaptcError(f"input {name!r}: expected {wanted}, got {value.dtype} with {value.ndim}")
            for axis, (got, size) in enumerate(zip(value.shape, want.shape, strict=True)):
                if isinstance(size, str) and not symbols(size) and (exact := expression(size)) is not None:
                    size = exact({})  # an expression without symbols: the tracer found out late that it is a number
                if isinstance(size, int) or size.isidentifier():
                    self._check_size(name, axis, got, size, sizes, longer)
                else:
                    made.append((name, axis, got, size))
        for name, axis, got, size in made:
            self._check_made(name, axis, got, size, sizes)
        self._check_conditions(flat, longer)

    def _check_size(
        self,
        name: str,
        axis: int,
        got: int,
        size: int | str,
        sizes: dict[str, tuple[int, str]],
        longer: Mapping[str, int],
    ) -> None:
        if isinstance(size, int):
            if got != size:
                raise AdaptcError(
                    f"input {name!r}: axis {axis} has size {got}, but the program was captured for exactly {size}; "
                    f"capture the model with example_inputs of size {got} there or, where it takes any size, with "
                    "dynamic_shapes that leave this axis free"
                )
            return
        where = f"axis {axis} of {name!r}"
        if size in sizes and sizes[size][0] != got:
            raise AdaptcError(f"{where} has size {got}, but must equal {sizes[size][1]}, which has {sizes[size][0]}")
        sizes.setdefault(size, (got, where))
        self._check_range(where, got, size, longer.get(size, 0))

    def _check_made(self, name: str, axis: int, got: int, size: str, sizes: dict[str, tuple[int, str]]) -> None:
        """Raise AdaptcError where a size breaks its expression over other sizes, such as ``2*s7``.

        A single symbol of the expression that no input has by itself is solved for, and added to ``sizes``.
        """
        where, function = f"axis {axis} of {name!r}", expression(size)
        unknown = [s for s in symbols(size) if s not in sizes]
        if function is None or len(unknown) > 1:
            return  # the graph itself fails where the size does not fit
        known = {s: n for s, (n, _) in sizes.items()}
        if unknown:
            found = solved(size, known, unknown[0], got)
            if found is None:
                raise AdaptcError(f"{where} has size {got}, but must be {size} for some number {unknown[0]}")
            sizes[unknown[0]] = found, f"{unknown[0]}, by which {where} is {size}"
            self._check_range(sizes[unknown[0]][1], found, unknown[0])
        elif function(known) != got:
            others = ", ".join(f"{s} is {sizes[s][0]}, the size of {sizes[s][1]}" for s in symbols(size))
            raise AdaptcError(f"{where} has size {got}, but must be {size} = {function(known)} ({others})")
        self._check_range(where, got, size)

    def _check_range(self, where: str, got: int, size: str, more: int = 0) -> None:
        low, high = self.ranges.get(size, (0, inf))
        # torch's tracer writes 2 as the least size without having tried 0 and 1; what these would break is a guard.
        low = 0 if low <= 2 else low
        if not low <= got + more <= high:
            added = f" and the adapter puts {more} tokens in front: {got + more} is" if more else ","
            way = f". Give {high - more:g} tokens at most, or an adapter of fewer" if more else ""
            raise AdaptcError(f"{where} has size {got}{added} outside the captured range [{low:g}, {high:g}]{way}")

    def shapes(self, flat: Sequence[Any]) -> str:
        """Return the names and shapes of a call's tensors, for messages."""
        named = zip(flat, self.expected, strict=True)
        return listing(f"{name!r}: {tuple(v.shape)}" for v, (name, _) in named if isinstance(v, Tensor))

    def empty(self, flat: Sequence[Any]) -> list[str]:
        """Return a text for each tensor of a call that has a size of zero, for messages."""
        named = zip(flat, self.expected, strict=True)
        return [f"{n!r} has shape {tuple(v.shape)}" for v, (n, _) in named if isinstance(v, Tensor) and not v.numel()]

    def why_zero(self, flat: Sequence[Any], error: Exception) -> str:
        """Return a message for a call that failed with ``error`` and has a size of zero; '' where no size is zero."""
        if not (empty := self.empty(flat)):
            return ""
        divides = isinstance(error, ZeroDivisionError)
        does = "divides by a size that is zero here" if divides else "does not compute with a size of zero"
        return f"the model, or its capture, {does}: {', '.join(empty)}; leave such calls out"

    def why_broken(self, flat: Sequence[Any], error: Exception) -> str:
        """Return a message for a call in which an assertion of the graph failed; '' for any other ``error``."""
        if not str(error).startswith("Runtime assertion failed"):
            return ""
        first = str(error).splitlines()[0]
        return (
            f"these inputs break what the model, or its capture, holds them to: {first}. The shapes are "
            f"{self.shapes(flat)}"
        )

    def _check_conditions(self, flat: Sequence[Any], longer: Mapping[str, int]) -> None:
        shapes: list[Sequence[int]] = [v.shape if isinstance(v, Tensor) else () for v in flat]
        if longer:
            wanted = [w.shape if isinstance(w, TensorInput) else () for _, w in self.expected]
            shapes = [
                [n + longer.get(str(w), 0) for n, w in zip(*p, strict=True)] for p in zip(shapes, wanted, strict=True)
            ]
        for c in self._conditions:
            if c.broken(shapes):
                found = {self.expected[i][0]: tuple(shapes[i]) for i, _ in c.reads}
                raise AdaptcError(
                    f"the program was captured where {_short(c.text)}, which these inputs break: "
                    + ", ".join(f"{n!r} has shape {s}" for n, s in found.items())
                    + ". Capture the model once more with example_inputs of such sizes, for a program of its own"
                )


def _short(condition: str) -> str:
    """Return a condition on sizes, without the middle if it is long: long ones repeat their parts."""
    half = _LONGEST // 2
    return condition if len(condition) <= _LONGEST else f"{condition[:half]} ... {condition[-half:]}"


def first_names(program: ExportedProgram) -> tuple[str, ...]:
    """Return the names of a program's positional inputs; () where the program does not record them."""
    spec, signature = program.call_spec.in_spec, program.module_call_graph[0].signature
    names = None if signature is None else signature.forward_arg_names
    count = 0 if spec is None else len(spec.children()[0].children())
    return tuple(names[:count]) if names is not None else ()


def fill(how: str, like: Tensor) -> Tensor:
    """Return a keyword input that was left out, made from the input ``like``; ``how`` is a rule of ``Captured.fills``.

    "ones_like" and "full_like:N" have the shape of ``like``. Labels are -100, int64, of the shape of ``like``
    ("ignore_like") or one for each row. "nan_rows:dtype,sizes" gives NaN for each row.
    """
    if how == "ones_like":
        return torch.ones_like(like)
    if how.startswith(FULL_LIKE):
        return torch.full_like(like, int(how.removeprefix(FULL_LIKE)))
    if how.startswith(NAN_ROWS):
        kind, *sizes = how.removeprefix(NAN_ROWS).split(",")
        rows = (like.shape[0], *map(int, sizes))
        return torch.full(rows, torch.nan, dtype=_FLOATS.get(kind, torch.float32), device=like.device)
    shape = like.shape if how == "ignore_like" else like.shape[:1]
    return torch.full(shape, -100, dtype=torch.int64, device=like.device)
