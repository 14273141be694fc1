"""Draw sizes for the free dimensions of a program's inputs, within the ranges that it was captured with.

Every size symbol gets a value, such that every range and every relation between sizes holds. Values stay near those of
the capture, since a model may have a table of positions that ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import AdaptcError, nearest
from adaptc.passes.graph.pytree import pytree

#: size symbol -> value
SizeValues = Mapping[Any, int]


class SizeSampler:
    """A sampler of sizes for one program.

    ``inputs`` maps each input's name to its value in the graph: a fake tensor, a size, or a constant.
    """

    def __init__(self, program: ExportedProgram, inputs: Mapping[str, Any], generator: torch.Generator) -> None:
        self.inputs, self.generator = inputs, generator
        self.ranges = program.range_constraints
        example = program.example_inputs
        self.captured_sizes = self._read_captured_sizes(pytree.tree_leaves(example) if example is not None else [])

    def sample(self, fixed_shapes: Mapping[str, Sequence[int]], *, as_captured: bool = False) -> SizeValues:
        """Return values for all size symbols.

        ``fixed_shapes`` gives the shape that an input must have, by its name. ``as_captured`` takes the sizes of the
        capture where they are known. Raises AdaptcError for names and shapes that the program does not have.
        """
        pinned = self.captured_sizes if as_captured else self._sizes_of_fixed_shapes(fixed_shapes)
        exprs = [to_expression(s) for want in self.inputs.values() for s in sizes_of(want)]
        symbols = sorted({x for e in exprs for x in e.free_symbols}, key=str)
        for _ in range(200):
            sizes = {x: pinned[x] if x in pinned else self._draw(x) for x in symbols}
            if self._is_legal(sizes):
                self._check_shapes(fixed_shapes, sizes)
                return sizes
        raise AdaptcError(
            f"no sizes found that the program's ranges {dict(self.ranges)} allow"
            + (f" with {dict(fixed_shapes)}" if fixed_shapes else "")
            + "; give complete inputs with inputs="
        )

    def _read_captured_sizes(self, leaves: Sequence[Any]) -> dict[Any, int]:
        seen: dict[Any, int] = {}
        for want, value in zip(self.inputs.values(), leaves, strict=False):
            if isinstance(want, Tensor) and isinstance(value, Tensor) and want.ndim == value.ndim:
                for size, had in zip(want.shape, value.shape, strict=True):
                    if isinstance(expr := to_expression(size), sympy.Symbol):
                        seen[expr] = int(had)
        return seen

    def _sizes_of_fixed_shapes(self, fixed_shapes: Mapping[str, Sequence[int]]) -> dict[Any, int]:
        sizes: dict[Any, int] = {}
        for name, shape in fixed_shapes.items():
            want = self.inputs.get(name)
            if not isinstance(want, Tensor):
                near = nearest(name, self.inputs) or list(self.inputs)
                raise AdaptcError(f"shapes: the program has no tensor input {name!r}; did you mean one of {near}?")
            if len(shape) != want.ndim:
                raise AdaptcError(f"shapes: input {name!r} has {want.ndim} axes, got {tuple(shape)}")
            for size, value in zip(want.shape, shape, strict=True):
                if isinstance(expr := to_expression(size), sympy.Symbol):
                    sizes[expr] = int(value)
        return sizes

    def _draw(self, symbol: Any) -> int:
        low, high = self._range(symbol)
        had = self.captured_sizes.get(symbol, 4)
        lower, upper = max(low, had // 2, 1), max(had, 4)  # up to 4, so that a batch captured small may grow
        upper = max(lower, upper if high is None else min(upper, high))
        return int(torch.randint(lower, upper + 1, (), generator=self.generator))

    def _range(self, expr: Any) -> tuple[int, int | None]:
        bounds = self.ranges.get(expr)
        if bounds is None:
            return 0, None
        return int(bounds.lower), int(bounds.upper) if bool(bounds.upper < 2**31) else None

    def _is_legal(self, sizes: SizeValues) -> bool:
        for expr in self.ranges:
            if expr.free_symbols <= set(sizes):
                value, (low, high) = evaluate(expr, sizes), self._range(expr)
                if value < low or (high is not None and value > high):
                    return False
        return True

    def _check_shapes(self, fixed_shapes: Mapping[str, Sequence[int]], sizes: SizeValues) -> None:
        for name, shape in fixed_shapes.items():
            got = evaluate_shape(self.inputs[name], sizes)
            if got != tuple(shape):
                raise AdaptcError(
                    f"shapes: input {name!r} cannot have shape {tuple(shape)}: with the sizes that are fixed or shared "
                    f"it is {got}"
                )


def to_expression(size: Any) -> Any:
    """Return a size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def evaluate(expr: Any, sizes: SizeValues) -> int:
    return int(expr.subs(sizes))


def sizes_of(traced: Any) -> Sequence[Any]:
    """Return the sizes of a tensor, a size itself as a list of one, or nothing for a constant."""
    return traced.shape if isinstance(traced, Tensor) else [traced] if isinstance(traced, torch.SymInt) else []


def evaluate_shape(traced: Any, sizes: SizeValues) -> tuple[int, ...]:
    return tuple(evaluate(to_expression(s), sizes) for s in sizes_of(traced))
