"""Hoist the values of a lifted graph that depend on frozen inputs alone, so that calls do not compute them.

It takes the names of the frozen placeholders in stages, the longest-lived first: the base, then an adapter's slots. It
makes a main graph, which reads the hoisted values as inputs instead of computing them. For every stage it makes a
prologue, which computes them from the placeholders and the values of earlier stages. Run in order, they compute what
the graph did, op by op. The given graph is not changed.

Random numbers and writes are never hoisted. Neither are values that depend on a user's input or its sizes, nor values
that share memory with one that is written to or returned. A value also stays if it is not worth its memory: constants
of more than a megabyte, weights unpacked from a packed form, and values for which a limit leaves no room.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.analysis.costs import node_work
from adaptc.passes.graph.lifted import empty_like
from adaptc.passes.graph.mutation import is_metadata_assert, is_view, memory_groups, pure, static_tensors, written
from adaptc.passes.graph.pass_infra import GraphPass, PassResult

#: the size in bytes above which constants are computed in every call
CONSTANT_BYTES = 2**20
#: dtypes in which weights are packed to save memory
PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True)
class Prologue:
    """The computation of one stage: ``graph`` takes the nodes called ``inputs`` and returns those called ``outputs``.

    It returns a tuple. ``sources`` names, for each output, the frozen placeholders it is made from, through earlier
    stages too.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Hoisting:
    """A graph split into ``stages`` and ``main``.

    ``main`` takes the placeholders ``kept``, then the outputs of every stage, then the user's inputs. ``nbytes`` is the
    memory of the hoisted values without views of inputs, for slots of their present size.
    """

    main: fx.Graph
    stages: tuple[Prologue, ...]
    kept: tuple[str, ...]
    nbytes: int

    @property
    def count(self) -> int:
        """Return the number of hoisted values."""
        return sum(len(s.outputs) for s in self.stages)


@dataclass(frozen=True)
class Hoist(GraphPass):
    """A pass that splits a graph: the output is the main graph, ``data`` the whole :class:`Hoisting`.

    The count is that of the hoisted values. ``stages`` are the frozen placeholders. ``inputs`` are the user's, which
    come last. All other placeholders stay in the main graph. ``limit`` bounds ``nbytes``. ``views`` also hoists views
    of inputs and of hoisted values. ``constants`` also hoists values made from no input. These two save dispatches of
    an interpreter, and nothing in compiled code.
    """

    name: ClassVar[str] = "hoist"
    keeps_inputs: ClassVar[bool] = False

    stages: Sequence[Collection[str]] = field(repr=False)
    inputs: Collection[str] = field(repr=False)
    limit: int | None = None
    views: bool = True
    constants: bool = True

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        sweep = _Sweep(subject, self.stages)
        passable = {v for v in sweep.movable if sweep.worth(v, self.views, self.constants)}
        if self.limit is not None:
            _fit(sweep, passable, self.limit)
        made = _split(sweep, passable, self.inputs)
        return PassResult(made.main, made.count, data=made)


def stages_of(graph: fx.Graph, stages: Sequence[Collection[str]]) -> Mapping[fx.Node, int]:
    """Return, for each node that depends on frozen placeholders alone, the stage that could compute it."""
    return _Sweep(graph, stages).stage_of


class _Sweep:
    """The facts that one pass over a graph collects. ``stage_of`` maps movable nodes to the earliest possible stage."""

    def __init__(self, graph: fx.Graph, stages: Sequence[Collection[str]]) -> None:
        self.graph = graph
        self.count = len(stages)
        frozen = {name: i for i, names in enumerate(stages) for name in names}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.memory_of = memory_groups(graph)
        self.returned = {self.memory_of[n] for n in graph.output_node().all_input_nodes}
        dirty = {self.memory_of[n] for node in graph.nodes for n in written(node)}
        self.stage_of: dict[fx.Node, int] = {}
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self.movable: list[fx.Node] = []
        self.checks: list[fx.Node] = []
        for node in graph.nodes:
            if self.memory_of[node] in dirty:
                continue
            if node.op == "placeholder" and node.name in frozen and isinstance(node.meta.get("val"), Tensor):
                self.stage_of[node], self.sources[node] = frozen[node.name], frozenset([node])
            elif all(n in self.stage_of for n in node.all_input_nodes) and pure(node):
                if static_tensors(node):
                    self.movable.append(node)
                elif is_metadata_assert(node):
                    self.checks.append(node)
                else:
                    continue
                self.stage_of[node] = max((self.stage_of[n] for n in node.all_input_nodes), default=0)
                self.sources[node] = frozenset().union(*(self.sources[n] for n in node.all_input_nodes))

    def worth(self, node: fx.Node, views: bool, constants: bool) -> bool:
        """Return whether the value may be passed to the main graph."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or self.memory_of[node] in self.returned:
            return False
        if not self.sources[node]:
            return constants and _bytes(self.root(node).meta["val"]) <= CONSTANT_BYTES
        if self.root(node) is not node:
            return views
        return not self._unpacked(node, value)

    def _unpacked(self, node: fx.Node, value: Tensor) -> bool:
        """Return whether the value is a weight unpacked from packed ones and takes more memory than they do."""
        sources = [n.meta["val"] for n in self.sources[node]]
        packed = any(v.dtype in PACKED and v.numel() * 8 >= value.numel() for v in sources)
        return packed and value.is_floating_point() and _bytes(value) > sum(map(_bytes, sources))

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node whose memory a movable value is."""
        while node.op != "placeholder":
            made = node.args[0] if node.target is operator.getitem else node
            if not is_view(made):  # type: ignore[arg-type]  # a getitem is one of a node
                return node
            node = made.args[0]  # type: ignore[union-attr, assignment]
        return node

    def memory(self, passed: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Return the bytes that the values hold beyond the inputs, by root node."""
        roots = dict.fromkeys(map(self.root, passed))
        return {r: _bytes(r.meta["val"]) for r in roots if r.op != "placeholder"}

    def passed(self, passable: Collection[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
        """Return (the values that the main graph reads, in order; the movable nodes that it has to compute itself)."""
        cut: set[fx.Node] = set()
        stays: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node in self.stage_of and node not in stays:
                continue
            for above in node.all_input_nodes:
                if above in passable:
                    cut.add(above)
                elif above.op != "placeholder" and above in self.stage_of:
                    stays.add(above)
        return [n for n in self.movable if n in cut], stays


def _fit(sweep: _Sweep, passable: set[fx.Node], limit: int) -> None:
    """Remove from ``passable`` the values that save the least work per byte, until the rest fits into the limit."""
    work = _saved(sweep)
    while True:
        memory = sweep.memory(sweep.passed(passable)[0])
        if sum(memory.values()) <= limit:
            return
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in passable:
            members.setdefault(sweep.root(node), []).append(node)
        room = limit
        for root in sorted((r for r in memory if memory[r]), key=lambda r: work[r] / memory[r], reverse=True):
            if memory[root] <= room:
                room -= memory[root]
            else:  # the values it is made from become candidates in the next round
                passable.difference_update(members[root])


def _saved(sweep: _Sweep) -> Mapping[fx.Node, float]:
    """Return, for each movable node, the operations that hoisting it saves.

    Work that several values need is divided among them.
    """
    out: dict[fx.Node, float] = {}
    for node in sweep.movable:
        value = node.meta["val"]
        own = float(node_work(node)) if isinstance(value, Tensor) else 0.0
        if sweep.root(node) is node and isinstance(value, Tensor):
            own = max(own, value.numel())  # node_work counts a cast as a view, since its schema is one's
        out[node] = own + sum(out.get(n, 0.0) / len(n.users) for n in node.all_input_nodes)
    return out


def _split(sweep: _Sweep, passable: Collection[fx.Node], inputs: Collection[str]) -> Hoisting:
    passed, stays = sweep.passed(passable)
    prologues: list[Prologue] = []
    done: set[fx.Node] = set()
    for i in range(sweep.count):
        outputs, checks = ([n for n in nodes if sweep.stage_of[n] == i] for nodes in (passed, sweep.checks))
        prologues.append(_prologue(sweep, outputs, checks, done))
        done.update(outputs)
    values = sorted(passed, key=lambda n: (sweep.stage_of[n], sweep.order[n]))
    main, kept = _main(sweep, values, stays, inputs)
    return Hoisting(main, tuple(prologues), kept, sum(sweep.memory(passed).values()))


def _prologue(sweep: _Sweep, outputs: list[fx.Node], checks: list[fx.Node], given: Collection[fx.Node]) -> Prologue:
    needed = set(outputs) | set(checks)
    for node in reversed(sweep.graph.nodes):
        if node in needed and node not in given:
            needed.update(node.all_input_nodes)
    new, values = fx.Graph(), {}
    inputs = [n for n in sweep.graph.nodes if n in needed and (n.op == "placeholder" or n in given)]
    for node in inputs:
        values[node] = _placeholder(new, node)
    for node in sweep.graph.nodes:
        if node in needed and node not in values:
            values[node] = _copy(new, node, values)
    new.output(tuple(values[n] for n in outputs))
    sources = tuple(_names(sorted(sweep.sources[n], key=sweep.order.__getitem__)) for n in outputs)
    return Prologue(new, _names(inputs), _names(outputs), sources)


def _main(
    sweep: _Sweep, passed: list[fx.Node], stays: Collection[fx.Node], inputs: Collection[str]
) -> tuple[fx.Graph, tuple[str, ...]]:
    graph = sweep.graph
    gone = {n for n in [*sweep.movable, *sweep.checks] if n not in stays}
    read = {m for n in graph.nodes if n not in gone for m in n.all_input_nodes}
    placeholders = graph.find_nodes(op="placeholder")
    kept = [n for n in placeholders if n.name not in inputs and (n in read or n not in sweep.stage_of)]
    new, values = empty_like(graph), {}
    for node in [*kept, *passed, *(n for n in placeholders if n.name in inputs)]:
        values[node] = _placeholder(new, node)
    for node in graph.nodes:
        if node.op != "placeholder" and node not in gone and node not in values:
            values[node] = _copy(new, node, values)
    return new, _names(kept)


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.create_node("placeholder", node.name, name=node.name)
    new.name = new.target = node.name  # fx renames a node whose name is a builtin's, such as "input"
    new.meta = {"val": node.meta.get("val")}
    return new


def _copy(graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    new = graph.node_copy(node, values.__getitem__)
    new.name = node.name
    return new


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size()
