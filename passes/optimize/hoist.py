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

from adaptc.passes.analysis.costs import count_node_operations
from adaptc.passes.graph.lifted import empty_graph_like
from adaptc.passes.graph.mutation import (
    has_static_sizes,
    is_metadata_assert,
    is_pure,
    is_view,
    memory_groups,
    written_inputs,
)
from adaptc.passes.graph.pass_infra import GraphPass, PassResult

#: the size in bytes above which constants are computed in every call
CONSTANT_BYTES = 2**20
#: dtypes in which weights are packed to save memory
PACKED_DTYPES = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}


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
class HoistedGraphs:
    """A graph split into ``stages`` and ``main``.

    ``main`` takes the placeholders ``kept``, then the outputs of every stage, then the user's inputs. ``nbytes`` is the
    memory of the hoisted values without views of inputs, for slots of their present size.
    """

    main: fx.Graph
    stages: tuple[Prologue, ...]
    kept_placeholders: tuple[str, ...]
    nbytes: int

    @property
    def count(self) -> int:
        """Return the number of hoisted values."""
        return sum(len(s.outputs) for s in self.stages)


@dataclass(frozen=True)
class Hoist(GraphPass):
    """A pass that splits a graph: the output is the main graph, ``data`` the whole :class:`HoistedGraphs`.

    The count is that of the hoisted values. ``stages`` are the frozen placeholders. ``inputs`` are the user's, which
    come last. All other placeholders stay in the main graph. ``limit`` bounds ``nbytes``. ``hoists_views`` also hoists
    views of inputs and of hoisted values. ``hoists_constants`` also hoists values made from no input. These two save
    dispatches of an interpreter, and nothing in compiled code.
    """

    name: ClassVar[str] = "hoist"
    keeps_inputs: ClassVar[bool] = False

    stages: Sequence[Collection[str]] = field(repr=False)
    user_inputs: Collection[str] = field(repr=False)
    limit: int | None = None
    hoists_views: bool = True
    hoists_constants: bool = True

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        sweep = _HoistAnalysis(subject, self.stages)
        passable = {v for v in sweep.movable if sweep.is_worth_hoisting(v, self.hoists_views, self.hoists_constants)}
        if self.limit is not None:
            _drop_beyond_limit(sweep, passable, self.limit)
        made = _split(sweep, passable, self.user_inputs)
        return PassResult(made.main, made.count, data=made)


def stage_by_node(graph: fx.Graph, stages: Sequence[Collection[str]]) -> Mapping[fx.Node, int]:
    """Return, for each node that depends on frozen placeholders alone, the stage that could compute it."""
    return _HoistAnalysis(graph, stages).stage_by_node


class _HoistAnalysis:
    """The facts that one pass over a graph collects. ``stage_by_node`` maps movable nodes to the earliest possible
    stage."""

    def __init__(self, graph: fx.Graph, stages: Sequence[Collection[str]]) -> None:
        self.graph = graph
        self.stage_count = len(stages)
        frozen = {name: i for i, names in enumerate(stages) for name in names}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.memory_groups = memory_groups(graph)
        self.returned_memory = {self.memory_groups[n] for n in graph.output_node().all_input_nodes}
        dirty = {self.memory_groups[n] for node in graph.nodes for n in written_inputs(node)}
        self.stage_by_node: dict[fx.Node, int] = {}
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self.movable: list[fx.Node] = []
        self.metadata_checks: list[fx.Node] = []
        for node in graph.nodes:
            if self.memory_groups[node] in dirty:
                continue
            if node.op == "placeholder" and node.name in frozen and isinstance(node.meta.get("val"), Tensor):
                self.stage_by_node[node], self.sources[node] = frozen[node.name], frozenset([node])
            elif all(n in self.stage_by_node for n in node.all_input_nodes) and is_pure(node):
                if has_static_sizes(node):
                    self.movable.append(node)
                elif is_metadata_assert(node):
                    self.metadata_checks.append(node)
                else:
                    continue
                self.stage_by_node[node] = max((self.stage_by_node[n] for n in node.all_input_nodes), default=0)
                self.sources[node] = frozenset().union(*(self.sources[n] for n in node.all_input_nodes))

    def is_worth_hoisting(self, node: fx.Node, hoists_views: bool, hoists_constants: bool) -> bool:
        """Return whether the value may be passed to the main graph."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or self.memory_groups[node] in self.returned_memory:
            return False
        if not self.sources[node]:
            return hoists_constants and _bytes(self.memory_root(node).meta["val"]) <= CONSTANT_BYTES
        if self.memory_root(node) is not node:
            return hoists_views
        return not self._is_unpacked_weight(node, value)

    def _is_unpacked_weight(self, node: fx.Node, value: Tensor) -> bool:
        """Return whether the value is a weight unpacked from packed ones and takes more memory than they do."""
        sources = [n.meta["val"] for n in self.sources[node]]
        packed = any(v.dtype in PACKED_DTYPES and v.numel() * 8 >= value.numel() for v in sources)
        return packed and value.is_floating_point() and _bytes(value) > sum(map(_bytes, sources))

    def memory_root(self, node: fx.Node) -> fx.Node:
        """Return the node whose memory a movable value is."""
        while node.op != "placeholder":
            made = node.args[0] if node.target is operator.getitem else node
            if not is_view(made):  # type: ignore[arg-type]  # a getitem is one of a node
                return node
            node = made.args[0]  # type: ignore[union-attr, assignment]
        return node

    def bytes_by_root(self, passed: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Return the bytes that the values hold beyond the inputs, by root node."""
        roots = dict.fromkeys(map(self.memory_root, passed))
        return {r: _bytes(r.meta["val"]) for r in roots if r.op != "placeholder"}

    def select_hoisted(self, candidates: Collection[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
        """Return (the values that the main graph reads, in order; the movable nodes that it has to compute itself)."""
        hoisted: set[fx.Node] = set()
        remaining: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node in self.stage_by_node and node not in remaining:
                continue
            for above in node.all_input_nodes:
                if above in candidates:
                    hoisted.add(above)
                elif above.op != "placeholder" and above in self.stage_by_node:
                    remaining.add(above)
        return [n for n in self.movable if n in hoisted], remaining


def _drop_beyond_limit(analysis: _HoistAnalysis, candidates: set[fx.Node], limit: int) -> None:
    """Remove from ``passable`` the values that save the least work per byte, until the rest fits into the limit."""
    work = _saved_work(analysis)
    while True:
        memory = analysis.bytes_by_root(analysis.select_hoisted(candidates)[0])
        if sum(memory.values()) <= limit:
            return
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in candidates:
            members.setdefault(analysis.memory_root(node), []).append(node)
        room = limit
        for root in sorted((r for r in memory if memory[r]), key=lambda r: work[r] / memory[r], reverse=True):
            if memory[root] <= room:
                room -= memory[root]
            else:  # the values it is made from become candidates in the next round
                candidates.difference_update(members[root])


def _saved_work(analysis: _HoistAnalysis) -> Mapping[fx.Node, float]:
    """Return, for each movable node, the operations that hoisting it saves.

    Work that several values need is divided among them.
    """
    out: dict[fx.Node, float] = {}
    for node in analysis.movable:
        value = node.meta["val"]
        own = float(count_node_operations(node)) if isinstance(value, Tensor) else 0.0
        if analysis.memory_root(node) is node and isinstance(value, Tensor):
            own = max(own, value.numel())  # node_work counts a cast as a view, since its schema is one's
        out[node] = own + sum(out.get(n, 0.0) / len(n.users) for n in node.all_input_nodes)
    return out


def _split(analysis: _HoistAnalysis, candidates: Collection[fx.Node], user_inputs: Collection[str]) -> HoistedGraphs:
    hoisted, remaining = analysis.select_hoisted(candidates)
    prologues: list[Prologue] = []
    done: set[fx.Node] = set()
    for i in range(analysis.stage_count):
        outputs, checks = (
            [n for n in nodes if analysis.stage_by_node[n] == i] for nodes in (hoisted, analysis.metadata_checks)
        )
        prologues.append(_make_prologue(analysis, outputs, checks, done))
        done.update(outputs)
    values = sorted(hoisted, key=lambda n: (analysis.stage_by_node[n], analysis.order[n]))
    main, kept = _make_main(analysis, values, remaining, user_inputs)
    return HoistedGraphs(main, tuple(prologues), kept, sum(analysis.bytes_by_root(hoisted).values()))


def _make_prologue(
    analysis: _HoistAnalysis, outputs: list[fx.Node], checks: list[fx.Node], earlier_outputs: Collection[fx.Node]
) -> Prologue:
    required = set(outputs) | set(checks)
    for node in reversed(analysis.graph.nodes):
        if node in required and node not in earlier_outputs:
            required.update(node.all_input_nodes)
    new, values = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [n for n in analysis.graph.nodes if n in required and (n.op == "placeholder" or n in earlier_outputs)]
    for node in inputs:
        values[node] = _add_placeholder(new, node)
    for node in analysis.graph.nodes:
        if node in required and node not in values:
            values[node] = _copy(new, node, values)
    new.output(tuple(values[n] for n in outputs))
    sources = tuple(_names(sorted(analysis.sources[n], key=analysis.order.__getitem__)) for n in outputs)
    return Prologue(new, _names(inputs), _names(outputs), sources)


def _make_main(
    analysis: _HoistAnalysis, hoisted: list[fx.Node], remaining: Collection[fx.Node], user_inputs: Collection[str]
) -> tuple[fx.Graph, tuple[str, ...]]:
    graph = analysis.graph
    removed = {n for n in [*analysis.movable, *analysis.metadata_checks] if n not in remaining}
    read = {m for n in graph.nodes if n not in removed for m in n.all_input_nodes}
    placeholders = graph.find_nodes(op="placeholder")
    kept = [n for n in placeholders if n.name not in user_inputs and (n in read or n not in analysis.stage_by_node)]
    new, values = empty_graph_like(graph), dict[fx.Node, fx.Node]()
    for node in [*kept, *hoisted, *(n for n in placeholders if n.name in user_inputs)]:
        values[node] = _add_placeholder(new, node)
    for node in graph.nodes:
        if node.op != "placeholder" and node not in removed and node not in values:
            values[node] = _copy(new, node, values)
    return new, _names(kept)


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)


def _add_placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
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
