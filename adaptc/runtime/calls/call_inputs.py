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
from adaptc.runtime.calls.output_form import OutputType
from adaptc.runtime.calls.size_conditions import parse_condition, parse_expression, solve_for_symbol, symbol_names

#: the start of the rule for an input that an adapter added; the number that fills it follows
FULL_LIKE = "full_like:"
#: the start of the rule for labels that are no classes; their dtype and the sizes of a row follow
NAN_ROWS = "nan_rows:"
_FLOATS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
NO_ADDED_TOKENS: Mapping[str, int] = MappingProxyType({})

#: the most characters of a condition that a message shows
_MAX_SHOWN = 240


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
    assumed of sizes in the capture. ``forward_arg_names`` is as for :class:`CallNames`. ``out_spec`` is the tree of the
    outputs.
    """

    def __init__(
        self,
        spec: pytree.TreeSpec,
        fills: Mapping[str, Sequence[str]],
        expected: Sequence[tuple[str, Any]],
        ranges: Mapping[str, tuple[float, float]],
        guards: Sequence[str] = (),
        forward_arg_names: Sequence[str] = (),
        out_spec: pytree.TreeSpec | None = None,
    ) -> None:
        self.spec, self.fills, self.expected, self.ranges = spec, fills, expected, ranges
        self.guards, self.forward_arg_names = tuple(guards), tuple(forward_arg_names)
        args_spec, kwargs_spec = spec.children()
        self.n_args = len(args_spec.children())
        self.names: list[str] = list(kwargs_spec.context or ())
        children = (*args_spec.children(), *kwargs_spec.children())
        self.is_flat = all(c.is_leaf() for c in children)
        flat = [name for name, _ in expected]
        constants = {n: want for n, want in expected if not isinstance(want, TensorInput)} if self.is_flat else {}
        positional = [
            *self.forward_arg_names[: self.n_args],
            *(f"input_{i}" for i in range(len(self.forward_arg_names), self.n_args)),
        ]
        self.call_names = CallNames(
            positional, self.names, self.forward_arg_names, fills, constants, OutputType.from_spec(out_spec)
        )
        self._conditions = [c for g in self.guards if (c := parse_condition(g, flat)) is not None]
        self._checked_keys: set[Any] = set()

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        fills: Mapping[str, Sequence[str]],
        forward_arg_names: Sequence[str] | None = None,
        free_axes: Collection[tuple[str, int]] = (),
    ) -> Inputs:
        """Return the inputs that a program was captured with.

        ``free_axes`` has the (name, axis) of sizes that may differ although they were captured as numbers. Raises
        AdaptcError for a program without an input spec.
        """
        spec = program.call_spec.in_spec
        if spec is None:
            raise AdaptcError("the program has no input spec; export it with torch.export.export")
        expected: list[tuple[str, Any]] = []
        for name, value in user_inputs(program).items():
            if isinstance(value, Tensor):
                sizes = (f"free_{name}_{i}" if (name, i) in free_axes else n for i, n in enumerate(value.shape))
                value = TensorInput(value.dtype, tuple(n if isinstance(n, int) else str(n) for n in sizes))
            expected.append((name, value))
        ranges = {str(k): (float(v.lower), float(v.upper)) for k, v in program.range_constraints.items()}
        return cls(
            spec,
            fills,
            expected,
            ranges,
            guards_of(program),
            forward_arg_names or positional_names(program),
            program.call_spec.out_spec,
        )

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], added_tokens: Mapping[str, int] = NO_ADDED_TOKENS
    ) -> list[Any]:
        """Return the arguments as a flat list; raise AdaptcError for those that do not fit.

        ``added_tokens`` maps a free size to the number of virtual tokens that an adapter adds to it inside the graph.
        """
        if len(kwargs) != len(self.names) or len(args) != self.n_args or not self.call_names.has_all_keywords(kwargs):
            args, kwargs = self.fill_missing(args, kwargs)
        ordered = {n: kwargs[n] for n in self.names}
        flat = [*args, *ordered.values()] if self.is_flat else self._flatten(args, ordered)
        key = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in flat)
        if added_tokens:
            key = (*key, *added_tokens.items())
        try:
            seen = key in self._checked_keys
        except TypeError:  # unhashable: a list or an array in the place of a tensor, which the check refuses
            self._check_inputs(flat, added_tokens)
            return flat
        if not seen:
            self._check_inputs(flat, added_tokens)
            if len(self._checked_keys) < 4096:
                self._checked_keys.add(key)
        return flat

    def size_locations(self) -> dict[str, tuple[int, int]]:
        """Return free size -> the (flat input, axis) that has it."""
        out: dict[str, tuple[int, int]] = {}
        for i, (_, want) in enumerate(self.expected):
            sizes = want.shape if isinstance(want, TensorInput) else ()
            out |= {n: (i, axis) for axis, n in enumerate(sizes) if isinstance(n, str) and n.isidentifier()}
        return out

    def fill_missing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as the program was captured, with the keyword inputs that were left out filled in.

        Raises AdaptcError for an input that the program does not take, and for one that is missing.
        """
        args, done = self.call_names.arrange_arguments(args, kwargs)
        for name in self.names:
            if name not in done:
                how, like = self.fills[name]
                if like not in done:
                    raise AdaptcError(self._with_usage(f"input {like!r} is missing"))
                if not isinstance(done[like], Tensor):
                    raise AdaptcError(self.call_names.not_tensor_text(like, done[like]))
                done[name] = make_default_input(how, done[like])
        return args, done

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            places = zip(
                (*args, *kwargs.values()), [c for s in self.spec.children() for c in s.children()], strict=True
            )
            for name, (value, meant) in zip((*self.call_names.positional, *self.names), places, strict=True):
                if meant.is_leaf() and value is not None and isinstance(value, (list, tuple, Mapping)):
                    raise AdaptcError(self.call_names.not_tensor_text(name, value))
            raise AdaptcError(self._with_usage(f"the inputs have another structure: {spec}"))
        return flat

    def _with_usage(self, what: str) -> str:
        return f"{what}. {self.call_names.usage_text()}"

    def _check_inputs(self, flat: Sequence[Any], added_tokens: Mapping[str, int]) -> None:
        """Raise AdaptcError for sizes and dtypes that the graph was not captured for.

        They would compute nonsense, or fail deep inside the graph. ``added_tokens``: as for :meth:`__call__`.
        """
        sizes: dict[str, tuple[int, str]] = {}
        derived_sizes: list[tuple[str, int, int, str]] = []
        if len(flat) != len(self.expected):
            raise AdaptcError(self._with_usage(f"got {len(flat)} inputs, expected {len(self.expected)}"))
        for value, (name, expected_input) in zip(flat, self.expected, strict=True):
            if not isinstance(expected_input, TensorInput):
                if isinstance(expected_input, (int, float, bool, str, type(None))) and value != expected_input:
                    raise AdaptcError(
                        f"input {name!r} was captured as the constant {expected_input!r}, got {value!r}; capture again"
                    )
                continue
            if not isinstance(value, Tensor):
                raise AdaptcError(self.call_names.not_tensor_text(name, value))
            if value.dtype != expected_input.dtype or value.ndim != len(expected_input.shape):
                wanted = f"{expected_input.dtype} with {len(expected_input.shape)} axes"
                raise AdaptcError(f"input {name!r}: expected {wanted}, got {value.dtype} with {value.ndim}")
            for axis, (got, size) in enumerate(zip(value.shape, expected_input.shape, strict=True)):
                if isinstance(size, str) and not symbol_names(size) and (exact := parse_expression(size)) is not None:
                    size = exact({})  # an expression without symbols: the tracer found out late that it is a number
                if isinstance(size, int) or size.isidentifier():
                    self._check_size(name, axis, got, size, sizes, added_tokens)
                else:
                    derived_sizes.append((name, axis, got, size))
        for name, axis, got, size in derived_sizes:
            self._check_derived_size(name, axis, got, size, sizes)
        self._check_conditions(flat, added_tokens)

    def _check_size(
        self,
        name: str,
        axis: int,
        actual: int,
        size: int | str,
        sizes: dict[str, tuple[int, str]],
        added_tokens: Mapping[str, int],
    ) -> None:
        if isinstance(size, int):
            if actual != size:
                raise AdaptcError(
                    f"input {name!r}: axis {axis} has size {actual}, but the program was captured for exactly {size}; "
                    f"capture the model with example_inputs of size {actual} there or, where it takes any size, with "
                    "dynamic_shapes that leave this axis free"
                )
            return
        where = f"axis {axis} of {name!r}"
        if size in sizes and sizes[size][0] != actual:
            raise AdaptcError(f"{where} has size {actual}, but must equal {sizes[size][1]}, which has {sizes[size][0]}")
        sizes.setdefault(size, (actual, where))
        self._check_range(where, actual, size, added_tokens.get(size, 0))

    def _check_derived_size(
        self, name: str, axis: int, actual: int, size: str, sizes: dict[str, tuple[int, str]]
    ) -> None:
        """Raise AdaptcError where a size breaks its expression over other sizes, such as ``2*s7``.

        A single symbol of the expression that no input has by itself is solved for, and added to ``sizes``.
        """
        axis_text, function = f"axis {axis} of {name!r}", parse_expression(size)
        unknown = [s for s in symbol_names(size) if s not in sizes]
        if function is None or len(unknown) > 1:
            return  # the graph itself fails where the size does not fit
        known = {s: n for s, (n, _) in sizes.items()}
        if unknown:
            found = solve_for_symbol(size, known, unknown[0], actual)
            if found is None:
                raise AdaptcError(f"{axis_text} has size {actual}, but must be {size} for some number {unknown[0]}")
            sizes[unknown[0]] = found, f"{unknown[0]}, by which {axis_text} is {size}"
            self._check_range(sizes[unknown[0]][1], found, unknown[0])
        elif function(known) != actual:
            others = ", ".join(f"{s} is {sizes[s][0]}, the size of {sizes[s][1]}" for s in symbol_names(size))
            raise AdaptcError(f"{axis_text} has size {actual}, but must be {size} = {function(known)} ({others})")
        self._check_range(axis_text, actual, size)

    def _check_range(self, axis_text: str, actual: int, size: str, added_count: int = 0) -> None:
        low, high = self.ranges.get(size, (0, inf))
        # torch's tracer writes 2 as the least size without having tried 0 and 1; what these would break is a guard.
        low = 0 if low <= 2 else low
        if not low <= actual + added_count <= high:
            added = (
                f" and the adapter puts {added_count} tokens in front: {actual + added_count} is"
                if added_count
                else ","
            )
            way = f". Give {high - added_count:g} tokens at most, or an adapter of fewer" if added_count else ""
            raise AdaptcError(
                f"{axis_text} has size {actual}{added} outside the captured range [{low:g}, {high:g}]{way}"
            )

    def describe_shapes(self, flat: Sequence[Any]) -> str:
        """Return the names and shapes of a call's tensors, for messages."""
        named = zip(flat, self.expected, strict=True)
        return listing(f"{name!r}: {tuple(v.shape)}" for v, (name, _) in named if isinstance(v, Tensor))

    def describe_empty(self, flat: Sequence[Any]) -> list[str]:
        """Return a text for each tensor of a call that has a size of zero, for messages."""
        named = zip(flat, self.expected, strict=True)
        return [f"{n!r} has shape {tuple(v.shape)}" for v, (n, _) in named if isinstance(v, Tensor) and not v.numel()]

    def explain_zero_size(self, flat: Sequence[Any], error: Exception) -> str:
        """Return a message for a call that failed with ``error`` and has a size of zero; '' where no size is zero."""
        if not (empty := self.describe_empty(flat)):
            return ""
        divides = isinstance(error, ZeroDivisionError)
        does = "divides by a size that is zero here" if divides else "does not compute with a size of zero"
        return f"the model, or its capture, {does}: {', '.join(empty)}; leave such calls out"

    def explain_assertion(self, flat: Sequence[Any], error: Exception) -> str:
        """Return a message for a call in which an assertion of the graph failed; '' for any other ``error``."""
        if not str(error).startswith("Runtime assertion failed"):
            return ""
        first = str(error).splitlines()[0]
        return (
            f"these inputs break what the model, or its capture, holds them to: {first}. The shapes are "
            f"{self.describe_shapes(flat)}"
        )

    def _check_conditions(self, flat: Sequence[Any], added_tokens: Mapping[str, int]) -> None:
        shapes: list[Sequence[int]] = [v.shape if isinstance(v, Tensor) else () for v in flat]
        if added_tokens:
            wanted = [w.shape if isinstance(w, TensorInput) else () for _, w in self.expected]
            shapes = [
                [n + added_tokens.get(str(w), 0) for n, w in zip(*p, strict=True)]
                for p in zip(shapes, wanted, strict=True)
            ]
        for c in self._conditions:
            if c.is_broken_by(shapes):
                found = {self.expected[i][0]: tuple(shapes[i]) for i, _ in c.size_positions}
                raise AdaptcError(
                    f"the program was captured where {_shorten(c.text)}, which these inputs break: "
                    + ", ".join(f"{n!r} has shape {s}" for n, s in found.items())
                    + ". Capture the model once more with example_inputs of such sizes, for a program of its own"
                )


def _shorten(condition: str) -> str:
    """Return a condition on sizes, without the middle if it is long: long ones repeat their parts."""
    half = _MAX_SHOWN // 2
    return condition if len(condition) <= _MAX_SHOWN else f"{condition[:half]} ... {condition[-half:]}"


def positional_names(program: ExportedProgram) -> tuple[str, ...]:
    """Return the names of a program's positional inputs; () where the program does not record them."""
    spec, signature = program.call_spec.in_spec, program.module_call_graph[0].signature
    names = None if signature is None else signature.forward_arg_names
    count = 0 if spec is None else len(spec.children()[0].children())
    return tuple(names[:count]) if names is not None else ()


def make_default_input(rule: str, source: Tensor) -> Tensor:
    """Return a keyword input that was left out, made from the input ``source``; ``rule`` is a rule of
    ``Captured.fills``.

    "ones_like" and "full_like:N" have the shape of ``source``. Labels are -100, int64, of the shape of ``source``
    ("ignore_like") or one for each row. "nan_rows:dtype,sizes" gives NaN for each row.
    """
    if rule == "ones_like":
        return torch.ones_like(source)
    if rule.startswith(FULL_LIKE):
        return torch.full_like(source, int(rule.removeprefix(FULL_LIKE)))
    if rule.startswith(NAN_ROWS):
        kind, *sizes = rule.removeprefix(NAN_ROWS).split(",")
        rows = (source.shape[0], *map(int, sizes))
        return torch.full(rows, torch.nan, dtype=_FLOATS.get(kind, torch.float32), device=source.device)
    shape = source.shape if rule == "ignore_like" else source.shape[:1]
    return torch.full(shape, -100, dtype=torch.int64, device=source.device)
