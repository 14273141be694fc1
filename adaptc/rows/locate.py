"""Find where the rows of a batch are in the values of a program, and prove that they stay apart.

Before: a program, and the nodes to be looked at. After: a :class:`RowAxis` for each, or a reason why there is none.
Symbolic sizes say which axes there may be: one whose size is the number of rows, or a multiple of it, with each row's
share in one stretch or spread evenly. Which of these it is, and whether rows mix (statistics over the batch, attention
across it, tokens sorted by expert), is seen by running the program on random inputs, then with one row after the other
replaced: all that changed must be of that row. Where nothing changes, and there is more than one way, there is none.
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

from adaptc.capture.random_inputs import Run, draw
from adaptc.errors import AdaptcError, TargetError
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.lifted import Lifted, user_inputs
from adaptc.passes.ir.rows import ORDERS, RowAxis
from adaptc.passes.ir.trees import pytree
from adaptc.runtime.state import written_to

#: rows that are run, where their number is free: of the first numbers that it may have one, a prime if it can be
ROWS = (3, 2, 4, 1)
#: other free sizes where the example inputs are not known
LENGTH = 4
#: seeds of the random inputs: where the first ones do not tell where rows are, others may
SEEDS = (11, 12, 13)
#: of the largest change: what a change of a row leaves in others where it is rounded otherwise there (products of other
#: sizes); what mixes rows changes them by far more
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
    """The batch of a program: the size that the first axis of its first tensor input has, of those where it is free.

    Raises TargetError where no input has an axis.
    """
    tensors = {n: v for n, v in user_inputs(program).items() if isinstance(v, Tensor) and v.ndim}
    if not tensors:
        raise TargetError("no input of the program has an axis of rows, so no row can have an adapter of its own")
    first = [v.shape[0] for v in tensors.values()]
    size = next((n for n in first if _free(n)), first[0])
    return Rows({n: 0 for n, v in tensors.items() if _expression(v.shape[0]) == _expression(size)}, size)


@exclusive
def locate(
    program: ExportedProgram, rows: Rows, wanted: Collection[str], probes: Sequence[Mapping[str, Any]] = ()
) -> tuple[dict[str, RowAxis], dict[str, str]]:
    """(node -> where the rows are in its value, node -> why nowhere) for nodes called ``wanted``. ``probes``: two sets
    of keyword inputs of equal shapes, for a program that says too little of its inputs to have them drawn."""
    nodes = {n.name: n for n in program.graph.nodes if n.name in wanted}
    fitting = {name: list(_choices(node.meta["val"], rows.size)) for name, node in nodes.items()}
    why = {n: f"its value {tuple(nodes[n].meta['val'].shape)} has no axis for the {rows.size} rows" for n in wanted}
    open_ = {name for name, found in fitting.items() if found}
    told: dict[str, set[int]] = {name: set() for name in open_}
    for seed in SEEDS:
        if not open_:
            break
        changes = _changes(program, rows, open_, probes or _drawn(program, rows, seed))
        for name in open_:
            changed = [c[name] for c in changes]
            fitting[name] = [c for c in fitting[name] if _apart(c, changed)]
            told[name] |= {row for row, places in enumerate(changed) if bool(places.any())}
            why[name] = "what one row of the batch is changes what others are there, so rows are not apart"
        free, count = _free(rows.size), len(changes)
        # One axis that has the symbol of the rows is theirs. A size that is a number may have it from elsewhere.
        open_ = {
            n
            for n in open_
            if count > 1 and fitting[n] and (len(fitting[n]) > 1 or not (free or len(told[n]) == count))
        }
    for name in open_:
        fitting[name] = []
        why[name] = "random inputs do not change what is there, so that nothing tells which row is where"
    return {n: fitting[n][0] for n in wanted if fitting[n]}, {n: why[n] for n in wanted if not fitting[n]}


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


def _free(size: Any) -> bool:
    return not _expression(size).is_number


def _changes(
    program: ExportedProgram, rows: Rows, names: Collection[str], probes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Tensor]]:
    """For each row what changed at the nodes when it was replaced. ``probes``: two sets of inputs, by name."""
    fakes = user_inputs(program)
    one, other = ([inputs[n] for n in fakes] for inputs in probes)
    first = next(v for n, v in zip(fakes, one, strict=True) if n in rows.inputs)
    before = _values(program, one, names)
    out = []
    for row in range(first.shape[rows.of[1]]):
        mixed = [_with_row(a, b, rows.inputs.get(n), row) for n, a, b in zip(fakes, one, other, strict=True)]
        after = _values(program, mixed, names)
        out.append({n: _changed(before[n], after[n]) for n in names})
    return out


def _drawn(program: ExportedProgram, rows: Rows, seed: int) -> list[dict[str, Any]]:
    """Two sets of random inputs of the same sizes, of as few rows as there can be."""

    def by_name(run: Run) -> dict[str, Any]:
        return dict(zip(user_inputs(program), pytree.tree_leaves((run.args, run.kwargs)), strict=True))

    for count in ROWS if _free(rows.size) else ():
        try:
            return [by_name(r) for r in draw(program, shapes=[_shapes(program, rows, count)] * 2, seed=seed)]
        except AdaptcError:  # so many there cannot be
            continue
    return [by_name(draw(program, shapes=1, seed=s)[0]) for s in (seed, seed + len(SEEDS))]


def _apart(where: RowAxis, changes: Sequence[Tensor]) -> bool:
    """Whether each row changed places of its own alone."""
    for row, changed in enumerate(changes):
        others = [i for i in range(changed.ndim) if i != where.axis]
        along = changed.any(others) if others and changed.ndim > 1 else changed.reshape(-1)
        places = along.nonzero().flatten()
        if not bool((where.rows(places, along.numel(), len(changes)) == row).all()):
            return False
    return True


def _shapes(program: ExportedProgram, rows: Rows, count: int) -> dict[str, Sequence[int]]:
    """Shapes with so many rows and, as far as they are known, the other sizes of the capture."""
    fakes = user_inputs(program)
    examples = pytree.tree_leaves(program.example_inputs) if program.example_inputs is not None else []
    known = dict(zip(fakes, examples, strict=False))
    out: dict[str, Sequence[int]] = {}
    for name, axis in rows.inputs.items():
        value = known.get(name)
        like = value if isinstance(value, Tensor) else fakes[name]
        out[name] = [count if i == axis else n if isinstance(n, int) else LENGTH for i, n in enumerate(like.shape)]
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
    if not a.numel():
        return torch.zeros_like(a, dtype=torch.bool)
    off, rounding = (a - b).abs(), 4 * torch.finfo(a.dtype).eps
    size = float(a.abs().nan_to_num(posinf=0.0).max())
    return ~(off <= max(SHARE * float(off.nan_to_num(posinf=0.0).max()), rounding * size))


@torch.no_grad()
def _values(program: ExportedProgram, flat: Sequence[Any], names: Collection[str]) -> dict[str, Tensor]:
    """The values of nodes in one call."""
    opened = Lifted(program, edit=False)
    specs = [s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    lifted = [opened.tensor(str(s.target)) for s in specs]
    # What the program writes to must not be changed by being looked at.
    written = written_to(program.graph)
    lifted = [t.clone() if s.arg.name in written else t for s, t in zip(specs, lifted, strict=True)]
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
