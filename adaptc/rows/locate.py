"""Find where the rows of a batch are in the values of a program, and prove that they stay apart.

Before: a program, and the nodes to be looked at. After: a :class:`RowAxis` for each, or a reason why there is none.
Symbolic sizes say which axes there may be: one whose size is the number of rows, or a multiple of it, with each row's
share in one stretch or spread evenly. Which of these it is, and whether rows mix (statistics over the batch, attention
across it, tokens sorted by expert), is seen by running the program on random inputs, then with one row after the other
replaced: all that changed must be of that row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.capture.random_inputs import draw
from adaptc.errors import AdaptcError, TargetError
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.lifted import Lifted, user_inputs
from adaptc.passes.ir.rows import ORDERS, RowAxis
from adaptc.passes.ir.trees import pytree

#: rows that are run, where their number is free; a prime that is no other size's usual value
ROWS = 3
#: other free sizes where the example inputs are not known
LENGTH = 4
#: a change of a row leaves rounding in others (products of other sizes); what mixes rows changes them by far more
SHARE = 1e-3


@dataclass(frozen=True)
class Rows:
    """``inputs``: name -> axis of the user's inputs that have a row of the batch at each place; ``size``: the number of
    rows as the graph has it, a number or a symbol. ``of``: the first of the inputs."""

    inputs: Mapping[str, int]
    size: Any

    @property
    def of(self) -> tuple[str, int]:
        return next(iter(self.inputs.items()))


def rows_of(program: ExportedProgram) -> Rows:
    """The batch of a program: the size that the first axis of its first tensor input has.

    Raises TargetError where no input has an axis.
    """
    tensors = {n: v for n, v in user_inputs(program).items() if isinstance(v, Tensor) and v.ndim}
    if not tensors:
        raise TargetError("no input of the program has an axis of rows, so no row can have an adapter of its own")
    size = next(iter(tensors.values())).shape[0]
    return Rows({n: 0 for n, v in tensors.items() if _expression(v.shape[0]) == _expression(size)}, size)


@exclusive
def locate(
    program: ExportedProgram, rows: Rows, wanted: Collection[str], probes: Sequence[Mapping[str, Any]] = ()
) -> tuple[dict[str, RowAxis], dict[str, str]]:
    """(node -> where the rows are in its value, node -> why nowhere) for nodes called ``wanted``. ``probes``: two sets
    of keyword inputs of equal shapes, for a program that says too little of its inputs to have them drawn."""
    nodes = {n.name: n for n in program.graph.nodes if n.name in wanted}
    choices = {name: list(_choices(node.meta["val"], rows.size)) for name, node in nodes.items()}
    open_ = {name for name, found in choices.items() if found}
    seen = _Seen(program, rows, open_, probes)
    where: dict[str, RowAxis] = {}
    why: dict[str, str] = {}
    for name in wanted:
        fitting = [c for c in choices[name] if seen.fits(name, c)] if name in open_ else []
        if fitting:
            where[name] = fitting[0]
        elif name not in open_:
            why[name] = f"its value {tuple(nodes[name].meta['val'].shape)} has no axis for the {rows.size} rows"
        else:
            why[name] = "what one row of the batch is changes what others are there, so rows are not apart"
    return where, why


def _choices(value: Any, size: Any) -> Iterator[RowAxis]:
    if not isinstance(value, Tensor):
        return
    rows = _expression(size)
    for axis, n in enumerate(value.shape):
        if _expression(n) == rows:
            yield RowAxis(axis)
    for axis, n in enumerate(value.shape):
        each = sympy.simplify(_expression(n) / rows)
        whole = each.is_integer if rows.is_number else rows.free_symbols.isdisjoint(each.free_symbols)
        if each != 1 and whole and (rows.is_number or rows.free_symbols <= _expression(n).free_symbols):
            yield from (RowAxis(axis, order) for order in ORDERS[1:])


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class _Seen:
    """What changed at the nodes when one row after the other was replaced."""

    def __init__(
        self, program: ExportedProgram, rows: Rows, names: Collection[str], probes: Sequence[Mapping[str, Any]]
    ) -> None:
        self.changes: list[dict[str, Tensor]] = []
        if not names:
            return
        fakes = user_inputs(program)
        one, other = _flat_probes(program, rows, probes)
        first = next(v for n, v in zip(fakes, one, strict=True) if n in rows.inputs)
        self.count = first.shape[rows.inputs[next(iter(rows.inputs))]]
        before = _values(program, one, names)
        for row in range(self.count):
            mixed = [_with_row(a, b, rows.inputs.get(n), row) for n, a, b in zip(fakes, one, other, strict=True)]
            after = _values(program, mixed, names)
            self.changes.append({n: _changed(before[n], after[n]) for n in names})

    def fits(self, name: str, where: RowAxis) -> bool:
        """Whether each row changed places of its own alone."""
        for row, changes in enumerate(self.changes):
            changed = changes[name]
            others = [i for i in range(changed.ndim) if i != where.axis]
            along = changed.any(others) if others and changed.ndim > 1 else changed.reshape(-1)
            places = along.nonzero().flatten()
            if not bool((where.rows(places, along.numel(), self.count) == row).all()):
                return False
        return True


def _flat_probes(program: ExportedProgram, rows: Rows, probes: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    if probes:
        names = program.call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
        return [[inputs[n] for n in names] for inputs in probes]
    free = not isinstance(rows.size, int)
    shapes = [_shapes(program, rows) if free else {}] * 2
    return [pytree.tree_leaves((run.args, run.kwargs)) for run in draw(program, shapes=shapes, seed=11)]


def _shapes(program: ExportedProgram, rows: Rows) -> dict[str, Sequence[int]]:
    """Shapes with the wanted number of rows and, as far as they are known, the other sizes of the capture."""
    examples = pytree.tree_leaves(program.example_inputs) if program.example_inputs is not None else []
    known = dict(zip(user_inputs(program), examples, strict=False))
    out: dict[str, Sequence[int]] = {}
    for name, axis in rows.inputs.items():
        value, fake = known.get(name), user_inputs(program)[name]
        shape = list(value.shape) if isinstance(value, Tensor) else [LENGTH] * fake.ndim
        shape[axis] = ROWS
        out[name] = shape
    return out


def _with_row(one: Any, other: Any, axis: int | None, row: int) -> Any:
    """``one`` with a row of ``other``."""
    if axis is None or not isinstance(one, Tensor) or one.shape != other.shape:
        return one
    out = one.clone()
    out.select(axis, row).copy_(other.select(axis, row))
    return out


def _changed(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise AdaptcError("the number of values in the program depends on what they are, so rows cannot be followed")
    if not (a.is_floating_point() or a.is_complex()):
        return a != b
    size = float(a.abs().nan_to_num().max()) if a.numel() else 0.0
    return ~((a - b).abs() <= SHARE * size)


@torch.no_grad()
def _values(program: ExportedProgram, flat: Sequence[Any], names: Collection[str]) -> dict[str, Tensor]:
    """The values of nodes in one call."""
    opened = Lifted(program, edit=False)
    specs = [s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    writes = bool(program.graph_signature.buffers_to_mutate)
    lifted = [opened.tensor(str(s.target)) for s in specs]
    # What the program writes to must not be changed by being looked at.
    lifted = [t.clone() if writes and isinstance(t, Tensor) else t for t in lifted]
    # What is written to an input stays there, too.
    own = [t.clone() if isinstance(t, Tensor) else t for t in flat]
    return _Recorder(program.graph_module, set(names)).record([*lifted, *own])


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names, self.found = names, {}

    def record(self, flat: Sequence[Any]) -> dict[str, Tensor]:
        super().run(*flat)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value.detach().clone()
        return value
