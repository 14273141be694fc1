"""The arguments of a call: flattened as the program was captured, and checked against the sizes it was captured for.

Before: what a user passes. After: a flat list that the graph takes, or an error that says which input is wrong and what
would fit. What was checked once is not checked again: the work of a call does not grow with what is known to be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import AdaptcError
from adaptc.passes.ir.lifted import user_inputs
from adaptc.passes.ir.trees import pytree


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
        expected: list[tuple[str, Any]] = []
        for name, value in user_inputs(program).items():
            if isinstance(value, Tensor):
                value = TensorInput(value.dtype, tuple(n if isinstance(n, int) else str(n) for n in value.shape))
            expected.append((name, value))
        ranges = {str(k): (float(v.lower), float(v.upper)) for k, v in program.range_constraints.items()}
        return cls(spec, fills, expected, ranges)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(kwargs) != len(self.names) or len(args) != self.n_args:
            kwargs = self.complete(args, kwargs)
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

    def where(self) -> dict[str, tuple[int, int]]:
        """Free size -> a flat input, and its axis, that has it."""
        out: dict[str, tuple[int, int]] = {}
        for i, (_, want) in enumerate(self.expected):
            sizes = want.shape if isinstance(want, TensorInput) else ()
            out |= {n: (i, axis) for axis, n in enumerate(sizes) if isinstance(n, str)}
        return out

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` with what was left out. Raises AdaptcError for inputs that the program has not."""
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
