"""Find where the rows of a batch are in the values of a program, and prove that they stay apart.

For each node in question it gives a :class:`RowAxis`, or a reason why there is none. Symbolic sizes say which axes
there may be. The size of such an axis is the number of rows, or a multiple of it. In a multiple, each row's share is
one stretch or spread evenly.

Runs tell which of these it is, and whether rows mix (statistics over the batch, attention across it, tokens sorted by
expert). The program runs on random inputs, then with one row after the other replaced: all that changes must be of that
row. Where nothing changes, and there is more than one candidate, no axis is given. The same runs show whether rows mix
in what the program returns and writes to; there the axis need not be known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.bank.row_independence import (
    ROWS_ARE_MIXED,
    ProgramOutput,
    are_rows_apart,
    candidate_axes,
    changed_elements,
    is_free_size,
    size_expression,
    why_shape_changed,
)
from adaptc.capture.inputs.random_inputs import CallInputs, draw_inputs
from adaptc.errors import AdaptcError, TargetError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, user_inputs
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.bank_method import RowAxis
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.torch_typing import fork_rng, shape_of

#: numbers of rows to run with where their number is free: the first that the program takes, so a prime if it can be
ROW_COUNTS = (3, 2, 4, 1)
#: size of other free axes where the example inputs are not known
FREE_SIZE = 4
#: seeds of the random inputs: where the first does not tell where the rows are, the next may
SEEDS = (11, 12, 13)


@dataclass(frozen=True)
class Batch:
    """The batch of a program.

    ``inputs``: name of a user's input -> its axis that has the rows. ``size``: the number of rows as the graph has it,
    a number or a symbol. ``first_input``: the first of the inputs, and its axis. ``picks``: inputs with the indices of
    rows, each with their number, where parts of the program compute with these rows.
    """

    inputs: Mapping[str, int]
    size: Any
    picks: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def first_input(self) -> tuple[str, int]:
        return next(iter(self.inputs.items()))

    def candidates(self, value: Any) -> list[RowAxis]:
        """Return the axes along which ``value`` may have the rows, or those of them that were picked."""
        found = list(candidate_axes(value, self.size))
        for name, size in self.picks.items():
            found = found or [replace(one, picked_by=name) for one in candidate_axes(value, size)]
        return found


def find_batch(program: ExportedProgram, axis: int = 0) -> Batch:
    """Return the batch of a program: the size of the ``axis`` of the first tensor input in which that axis is free.

    Where it is free in none, the first tensor input gives the batch. Raises TargetError where no input has the axis.
    """
    tensors = {n: v for n, v in user_inputs(program).items() if isinstance(v, Tensor) and v.ndim > axis}
    if not tensors:
        where = f"an axis {axis}" if axis else "an axis of rows"
        raise TargetError(f"no input of the program has {where}, so no row can have an adapter of its own")
    sizes = [v.shape[axis] for v in tensors.values()]
    size = next((n for n in sizes if is_free_size(n)), sizes[0])
    return Batch({n: axis for n, v in tensors.items() if size_expression(v.shape[axis]) == size_expression(size)}, size)


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a program whose rows are tokens of packed texts.

    ``axes``: name of an input -> its axis of tokens. ``picked_by``: inputs with the indices of tokens: of those that go
    on to the head, and of those that read rows of latents.
    """

    axes: Mapping[str, int]
    picked_by: Sequence[str] = ()

    def batch(self, program: ExportedProgram) -> Batch:
        """Return the batch of these tokens."""
        (name, axis), inputs = next(iter(self.axes.items())), user_inputs(program)
        return Batch(self.axes, inputs[name].shape[axis], {n: inputs[n].shape[0] for n in self.picked_by})


@with_graph_lock
def find_row_axes(
    program: ExportedProgram,
    batch: Batch,
    node_names: Collection[str],
    probes: Sequence[Mapping[str, Any]] = (),
    outputs: Mapping[str, ProgramOutput] = MappingProxyType({}),
    adapted_weights: Collection[str] = (),
    routing: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, RowAxis], dict[str, str]]:
    """Return (node -> where the rows are in its value, node -> why nowhere) for the nodes called ``node_names``.

    ``probes``: two sets of keyword inputs of equal shapes, for a program whose inputs cannot be drawn at random.
    ``outputs``: node -> a value in which rows must be apart as well; the second dict has an entry for it only where
    they are not. ``adapted_weights``: FQNs of parameters that adapters change. Those that are zero are replaced by
    random values, for zeros would hide what mixes rows in front of them. ``routing``: node of an expert's matmul -> the
    node that gives it its tokens, by their indices. There tokens are looked at in the order of their indices.
    """
    nodes = {n.name: n for n in program.graph.nodes if n.name in node_names}
    candidates = {name: batch.candidates(node.meta["val"]) for name, node in nodes.items()}
    for name in routing.keys() & candidates.keys():
        candidates[name] = [one for one in candidates[name] if not one.axis]
    reasons = {
        n: f"its value {tuple(nodes[n].meta['val'].shape)} has no axis for the {batch.size} rows" for n in node_names
    }
    undecided = {name for name, found in candidates.items() if found}
    rows_seen: dict[str, set[int]] = {name: set() for name in undecided}
    mixed_outputs: dict[str, str] = {}
    replaced = _random_for_zeros(program, adapted_weights)
    for seed in SEEDS:
        if not undecided and (seed != SEEDS[0] or not outputs):
            break
        inputs = probes or _draw_inputs(program, batch, seed)
        changes = _replace_each_row(program, batch, {*undecided, *outputs}, inputs, replaced, routing)
        mixed_outputs |= {
            n: reason for n, end in outputs.items() if (reason := end.why_mixed(batch.size, [c[n] for c in changes]))
        }
        for name in undecided:
            seen = [c[name] for c in changes]
            candidates[name] = [c for c in candidates[name] if are_rows_apart(c, seen)]
            rows_seen[name] |= {row for row, places in enumerate(seen) if places is not None and bool(places.any())}
            reasons[name] = why_shape_changed(seen) or ROWS_ARE_MIXED
        symbolic, count = is_free_size(batch.size), len(changes)
        # A single axis with the symbol of the rows is theirs. Where the batch is fixed, another axis may merely have
        # an equal size, so a change must have told every row there.
        undecided = {
            n
            for n in undecided
            if count > 1 and candidates[n] and (len(candidates[n]) > 1 or not (symbolic or len(rows_seen[n]) == count))
        }
    for name in undecided:
        candidates[name] = []
        reasons[name] = "random inputs do not change what is there, so that nothing tells which row is where"
    found = {n: replace(candidates[n][0], routed_by=routing.get(n, "")) for n in node_names if candidates[n]}
    return found, {n: reasons[n] for n in node_names if not candidates[n]} | mixed_outputs


def _replace_each_row(
    program: ExportedProgram,
    batch: Batch,
    node_names: Collection[str],
    probes: Sequence[Mapping[str, Any]],
    random_weights: Mapping[str, Tensor],
    routing: Mapping[str, str],
) -> list[dict[str, Tensor | None]]:
    """Return for each row what changed at the nodes when it was replaced (see
    :func:`~adaptc.bank.row_independence.changed_elements`).

    ``probes``: two sets of inputs, by name. ``random_weights``: FQN -> other values of a parameter. ``routing``: as for
    :func:`find_row_axes`.
    """

    nodes = {n.name: n for n in program.graph.nodes}
    indices = {name: nodes[by].all_input_nodes[1].name for name, by in routing.items() if name in node_names}

    def record(inputs: Sequence[Any]) -> dict[str, Any]:
        seen = _run_and_record(program, inputs, {*node_names, *indices.values()}, random_weights)
        in_order = {name: seen[name][seen[by].argsort(stable=True)] for name, by in indices.items()}
        return seen | in_order

    fakes = user_inputs(program)
    one, other = ([inputs[n] for n in fakes] for inputs in probes)
    first = next(v for n, v in zip(fakes, one, strict=True) if n in batch.inputs)
    before = record(one)
    out: list[dict[str, Tensor | None]] = []
    for row in range(first.shape[batch.first_input[1]]):
        mixed = [_replace_row(a, b, batch.inputs.get(n), row) for n, a, b in zip(fakes, one, other, strict=True)]
        after = record(mixed)
        out.append({n: changed_elements(before[n], after[n]) for n in node_names})
    return out


def _draw_inputs(program: ExportedProgram, batch: Batch, seed: int) -> list[dict[str, Any]]:
    """Return two sets of random inputs of the same sizes, with the first number in :data:`ROW_COUNTS` that the program
    takes.

    Where the number of rows is fixed, or the program takes none of these, they have the sizes of the capture.
    """

    def by_name(run: CallInputs) -> dict[str, Any]:
        return dict(zip(user_inputs(program), pytree.tree_leaves((run.args, run.kwargs)), strict=True))

    for count in ROW_COUNTS if is_free_size(batch.size) else ():
        try:
            return [
                by_name(r) for r in draw_inputs(program, shapes=[_input_shapes(program, batch, count)] * 2, seed=seed)
            ]
        except AdaptcError:  # the program does not take this number of rows
            continue
    return [by_name(draw_inputs(program, shapes=1, seed=s)[0]) for s in (seed, seed + len(SEEDS))]


def _input_shapes(program: ExportedProgram, batch: Batch, count: int) -> dict[str, Sequence[int]]:
    """Return the shapes of inputs with ``count`` rows, and other sizes as in the example inputs where these are
    known."""
    fakes = user_inputs(program)
    examples = pytree.tree_leaves(program.example_inputs) if program.example_inputs is not None else []
    known = dict(zip(fakes, examples, strict=False))
    out: dict[str, Sequence[int]] = {}
    for name, axis in batch.inputs.items():
        value = known.get(name)
        like = value if isinstance(value, Tensor) else fakes[name]
        out[name] = [
            count if i == axis else n if isinstance(n, int) else FREE_SIZE for i, n in enumerate(shape_of(like))
        ]
    return out


def _replace_row(inputs: Any, replacement: Any, axis: int | None, row: int) -> Any:
    """Return ``inputs`` with a row of ``replacement``; ``inputs`` itself where the input has no rows."""
    if axis is None or not isinstance(inputs, Tensor) or inputs.shape != replacement.shape:
        return inputs
    out = inputs.clone()
    out.select(axis, row).copy_(replacement.select(axis, row))
    return out


def _random_for_zeros(program: ExportedProgram, fqns: Collection[str]) -> dict[str, Tensor]:
    """Return random values for those of the parameters that are zero everywhere."""
    opened, generator = LiftedProgram(program, edit=False), torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for fqn in fqns:
        t = opened.tensor(fqn).detach()
        # For most weights the first value already tells that they are not zero.
        if t.is_floating_point() and t.numel() and not (t[(0,) * t.ndim] or t.any()):
            out[str(opened.input_specs[opened.placeholders[fqn].name].target)] = torch.randn(
                t.shape, generator=generator
            ).to(t)
    return out


@torch.no_grad()
def _run_and_record(
    program: ExportedProgram, flat: Sequence[Any], names: Collection[str], replaced: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the values of nodes in one call; for inputs and buffers that it writes to, the values after it."""
    opened = LiftedProgram(program, edit=False)
    specs = [s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    lifted = [replaced.get(str(s.target), opened.tensor(str(s.target))) for s in specs]
    # A run here must not change the buffers that the program writes to.
    written = written_placeholders(program.graph)
    lifted = [t.clone() if s.arg.name in written else t for s, t in zip(specs, lifted, strict=True)]
    # Nor may it change the caller's inputs, which the program may write to as well.
    own = [t.clone() if isinstance(t, Tensor) else t for t in flat]
    gpus = {t.device.index or 0 for t in (*lifted, *own) if isinstance(t, Tensor) and t.is_cuda}
    with fork_rng(sorted(gpus)):  # every run draws the same numbers, and none of the caller's
        return _Recorder(program.graph_module, set(names)).record([*lifted, *own])


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.inputs = module.graph.find_nodes(op="placeholder")
        self.names = names
        self.recorded: dict[str, Any] = {}

    def record(self, flat: Sequence[Any]) -> dict[str, Any]:
        super().run(*flat)
        return self.recorded | {n.name: t for n, t in zip(self.inputs, flat, strict=True) if n.name in self.names}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.recorded[n.name] = value.detach().clone() if isinstance(value, Tensor) else value
        return value
