"""Find where the rows of a batch are in the values of a program, and prove that they stay apart.

Before: a program, and the nodes to be looked at. After: a :class:`RowAxis` for each, or a reason why there is none.
Symbolic sizes say which axes there may be: one whose size is the number of rows, or a multiple of it, with each row's
share in one stretch or spread evenly. Which of these it is, and whether rows mix (statistics over the batch, attention
across it, tokens sorted by expert), is seen by running the program on random inputs, then with one row after the other
replaced: all that changed must be of that row. Where nothing changes, and there is more than one way, there is none.
What the program gives, and what it writes to, is looked at in the same runs: there it need not be told which way it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.capture.random_inputs import Run, draw
from adaptc.errors import AdaptcError, TargetError
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.lifted import Lifted, user_inputs
from adaptc.passes.ir.rows import RowAxis
from adaptc.passes.ir.trees import pytree
from adaptc.rows.apart import MIXED, End, apart, changed, choices, expression, free, size_depends
from adaptc.runtime.state import written_to

#: rows that are run, where their number is free: of the first numbers that it may have one, a prime if it can be
ROWS = (3, 2, 4, 1)
#: other free sizes where the example inputs are not known
LENGTH = 4
#: seeds of the random inputs: where the first ones do not tell where rows are, others may
SEEDS = (11, 12, 13)


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
    size = next((n for n in first if free(n)), first[0])
    return Rows({n: 0 for n, v in tensors.items() if expression(v.shape[0]) == expression(size)}, size)


@exclusive
def locate(
    program: ExportedProgram,
    rows: Rows,
    wanted: Collection[str],
    probes: Sequence[Mapping[str, Any]] = (),
    ends: Mapping[str, End] = MappingProxyType({}),
    adapted: Collection[str] = (),
) -> tuple[dict[str, RowAxis], dict[str, str]]:
    """(node -> where the rows are in its value, node -> why nowhere) for nodes called ``wanted``. ``probes``: two sets
    of keyword inputs of equal shapes, for a program that says too little of its inputs to have them drawn. ``ends``:
    what must be apart as well, of which there is an entry only where it is not. ``adapted``: FQNs of parameters that
    adapters change: where they are zero others are taken, for zeros would hide what mixes in front of them."""
    nodes = {n.name: n for n in program.graph.nodes if n.name in wanted}
    fitting = {name: list(choices(node.meta["val"], rows.size)) for name, node in nodes.items()}
    why = {n: f"its value {tuple(nodes[n].meta['val'].shape)} has no axis for the {rows.size} rows" for n in wanted}
    open_ = {name for name, found in fitting.items() if found}
    told: dict[str, set[int]] = {name: set() for name in open_}
    mixed: dict[str, str] = {}
    replaced = _instead_of_zeros(program, adapted)
    for seed in SEEDS:
        if not open_ and (seed != SEEDS[0] or not ends):
            break
        inputs = probes or _drawn(program, rows, seed)
        changes = _changes(program, rows, {*open_, *ends}, inputs, replaced)
        mixed |= {n: reason for n, end in ends.items() if (reason := end.mixed(rows.size, [c[n] for c in changes]))}
        for name in open_:
            seen = [c[name] for c in changes]
            fitting[name] = [c for c in fitting[name] if apart(c, seen)]
            told[name] |= {row for row, places in enumerate(seen) if places is not None and bool(places.any())}
            why[name] = size_depends(seen) or MIXED
        symbolic, count = free(rows.size), len(changes)
        # One axis that has the symbol of the rows is theirs. A size that is a number may have it from elsewhere.
        open_ = {
            n
            for n in open_
            if count > 1 and fitting[n] and (len(fitting[n]) > 1 or not (symbolic or len(told[n]) == count))
        }
    for name in open_:
        fitting[name] = []
        why[name] = "random inputs do not change what is there, so that nothing tells which row is where"
    found = {n: fitting[n][0] for n in wanted if fitting[n]}
    return found, {n: why[n] for n in wanted if not fitting[n]} | mixed


def _changes(
    program: ExportedProgram,
    rows: Rows,
    names: Collection[str],
    probes: Sequence[Mapping[str, Any]],
    replaced: Mapping[str, Tensor],
) -> list[dict[str, Tensor | None]]:
    """For each row what changed at the nodes when it was replaced; None for another number of values. ``probes``: two
    sets of inputs, by name; ``replaced``: other values of parameters, by FQN."""
    fakes = user_inputs(program)
    one, other = ([inputs[n] for n in fakes] for inputs in probes)
    first = next(v for n, v in zip(fakes, one, strict=True) if n in rows.inputs)
    before = _values(program, one, names, replaced)
    out = []
    for row in range(first.shape[rows.of[1]]):
        mixed = [_with_row(a, b, rows.inputs.get(n), row) for n, a, b in zip(fakes, one, other, strict=True)]
        after = _values(program, mixed, names, replaced)
        out.append({n: changed(before[n], after[n]) for n in names})
    return out


def _drawn(program: ExportedProgram, rows: Rows, seed: int) -> list[dict[str, Any]]:
    """Two sets of random inputs of the same sizes, of as few rows as there can be."""

    def by_name(run: Run) -> dict[str, Any]:
        return dict(zip(user_inputs(program), pytree.tree_leaves((run.args, run.kwargs)), strict=True))

    for count in ROWS if free(rows.size) else ():
        try:
            return [by_name(r) for r in draw(program, shapes=[_shapes(program, rows, count)] * 2, seed=seed)]
        except AdaptcError:  # so many there cannot be
            continue
    return [by_name(draw(program, shapes=1, seed=s)[0]) for s in (seed, seed + len(SEEDS))]


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


def _instead_of_zeros(program: ExportedProgram, fqns: Collection[str]) -> dict[str, Tensor]:
    """Random values for those of the parameters that are zero everywhere."""
    opened, generator = Lifted(program, edit=False), torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for fqn in fqns:
        t = opened.tensor(fqn).detach()
        # The first value tells of most weights that they are not.
        if t.is_floating_point() and t.numel() and not (t[(0,) * t.ndim] or t.any()):
            out[str(opened.specs[opened.placeholders[fqn].name].target)] = torch.randn(t.shape, generator=generator).to(
                t
            )
    return out


@torch.no_grad()
def _values(
    program: ExportedProgram, flat: Sequence[Any], names: Collection[str], replaced: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The values of nodes in one call; of what it writes to, those after it."""
    opened = Lifted(program, edit=False)
    specs = [s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    lifted = [replaced.get(str(s.target), opened.tensor(str(s.target))) for s in specs]
    # What the program writes to must not be changed by being looked at.
    written = written_to(program.graph)
    lifted = [t.clone() if s.arg.name in written else t for s, t in zip(specs, lifted, strict=True)]
    # What is written to an input stays there, too.
    own = [t.clone() if isinstance(t, Tensor) else t for t in flat]
    gpus = {t.device.index or 0 for t in (*lifted, *own) if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(sorted(gpus)):  # every run draws the same numbers, and none of the caller's
        return _Recorder(program.graph_module, set(names)).record([*lifted, *own])


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.inputs = module.graph.find_nodes(op="placeholder")
        self.names, self.found = names, {}

    def record(self, flat: Sequence[Any]) -> dict[str, Any]:
        super().run(*flat)
        return self.found | {n.name: t for n, t in zip(self.inputs, flat, strict=True) if n.name in self.names}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value.detach().clone() if isinstance(value, Tensor) else value
        return value
