"""Make fake tensors whose sizes are free symbols, so that code traced on them serves all sizes.

The values of a program are symbolic in the sizes of its inputs. An adapter's slots have the sizes of one adapter, which
would become constants of the traced code. Here both get symbols, in an environment that is thrown away. Only the traced
code is kept. Its values come from the program that it is put into (``propagate_fakes``). Where the slots become inputs
of a program, they get symbols in that program's own environment.

Private torch use, with the public route that was tried: ``FakeTensorMode``, ``detect_fake_mode``,
``ShapeEnv.suppress_guards``, and the environment of a fake value. Public: none. ``ShapeEnv.create_symbol`` and
``create_symintnode``, and the ranges of its symbols. Public: ``make_fx(tracing_mode="symbolic")`` on tensors of example
sizes. It needs memory for them, and identifies sizes that are equal by chance. ``torch.export.Dim`` is for inputs of
modules.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, cycle, repeat
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import numbers
from torch.utils._sympy.value_ranges import ValueRanges

from adaptc.torch_typing import is_mapping, shape_of

_untyped: Any = numbers
_UNLIMITED = _untyped.int_oo
#: the example value of every free size
SIZE_HINT = 16


class FreeSizeFakes:
    """An environment of free sizes. Sizes with one name are one size; no two other sizes are known to be equal.

    ``sums`` maps a name to the names of the sizes whose sum it is. ``mode`` is the fake mode of a program, whose
    environment gets the sizes; None makes an environment of its own. No example value of a size is in ``taken_hints``.
    ``limits`` are the least and the greatest value of a size, None for those that torch gives it.
    """

    def __init__(
        self,
        sums: Mapping[str, Sequence[str]] = MappingProxyType({}),
        mode: Any = None,
        taken_hints: Collection[int] = (),
        limits: tuple[int, int | None] | None = None,
    ) -> None:
        self.sums, self.limits = sums, limits
        self.mode: Any = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False)) if mode is None else mode
        self.shape_env: ShapeEnv = self.mode.shape_env
        self.sizes: dict[str, Any] = {}
        # Sizes that are equal by chance would be taken for one size in an environment that keeps its guards.
        self._hints = repeat(SIZE_HINT) if mode is None else _distinct_hints(taken_hints, limits and limits[1])

    def size(self, name: str, unit: int = 1) -> Any:
        """Return the symbol of a named size, made at its first use. Its example value is a multiple of ``unit``."""
        from torch._dynamo.source import ConstantSource

        if name in self.sums:
            return sum(self.size(part) for part in self.sums[name])
        if name not in self.sizes:
            source = ConstantSource(f"adaptc_{'free' if self.limits is None else 'slot'}_{len(self.sizes)}")
            hint = next(self._hints) * unit
            symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            if self.limits is not None:
                least, most = self.limits
                ranges: dict[Any, Any] = self.shape_env.var_to_range
                ranges[symbol] = ValueRanges(least, _UNLIMITED if most is None else most)
            self.sizes[name] = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        return self.sizes[name]

    def fake_like(self, value: Tensor, free_axes: Collection[int] | Mapping[int, str] = (), name: str = "") -> Tensor:
        """Return a fake like ``value`` in which each symbolic size and each axis in ``free_axes`` has a free size.

        The size along a free axis is called ``name``, or as the mapping ``free_axes`` says.
        """
        names: Mapping[int, str] = free_axes if is_mapping(free_axes) else dict.fromkeys(free_axes, name)
        shape = [
            self.size(names[i]) if i in names else s if isinstance(s, int) else self.size(str(s))
            for i, s in enumerate(shape_of(value))
        ]
        with self.mode:
            return torch.empty(shape, dtype=value.dtype, device=value.device)


def _distinct_hints(taken_hints: Collection[int], most: int | None) -> Iterator[int]:
    """Yield sizes that differ from each other and from the taken ones, none above ``most``.

    Where there are no more of them they come again: torch refuses a size that is out of its symbol's range.
    """
    if most is None:
        return (n for n in count(SIZE_HINT) if n not in taken_hints)
    free = [n for n in (*range(SIZE_HINT, most + 1), *range(2, min(SIZE_HINT, most + 1))) if n not in taken_hints]
    return cycle(free or [most])


@contextmanager
def limited_sizes(program: ExportedProgram, shape_env: ShapeEnv, largest: int) -> Generator[None]:
    """Run the block while free sizes of ``program`` that have no largest value have the value ``largest``.

    ``shape_env`` is the environment of the graph's values, which other programs may share.
    """
    untyped: Any = program
    tables: list[dict[Any, Any]] = [untyped.range_constraints, shape_env.var_to_range]
    free = {s for s, r in tables[0].items() if r.upper == _UNLIMITED}
    before = [{s: table[s] for s in free if s in table} for table in tables]
    try:
        for table, old in zip(tables, before, strict=True):
            table.update({s: ValueRanges(r.lower, largest) for s, r in old.items()})
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)


def fake_tensor_mode() -> FakeTensorMode:
    """Return a context in which new tensors have no values and belong to no program."""
    return FakeTensorMode()


@contextmanager
def suppress_size_guards(fakes: Iterable[Any]) -> Generator[None]:
    """Run the block with guards on the symbolic sizes of ``fakes`` suppressed, in the fake mode of these tensors.

    Without this, a fake convolution would ask for the batch size to choose its kernel, and the answer would become part
    of the program.
    """
    mode = detect_fake_mode(list(fakes))
    env = getattr(mode, "shape_env", None)
    # Inside the mode an arange gives a fake of the same program; outside it would give a real tensor.
    with nullcontext() if mode is None else mode, nullcontext() if env is None else env.suppress_guards():
        yield
