"""Turn the in-place ops of a graph into ops that return new values.

Decode steps write to their KV caches in place. Without such writes a graph is made of pure ops, and
:func:`~adaptc.passes.lower.lower_once.lower_once` lowers equal layers once. AOTAutograd makes the same turn where it
lowers a graph as a whole: the new values become the first outputs, and the compiler writes them back to the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from adaptc.passes.graph.mutation import has_mutable_schema, memory_groups, written_inputs
from adaptc.passes.graph.ops import schema_of


class Functional(NamedTuple):
    """A graph without writes to its inputs.

    Its first outputs are the new values of the placeholders with the numbers ``written``.
    """

    graph: fx.Graph
    written: tuple[int, ...]


def without_writes(graph: fx.Graph) -> Functional:
    """Return a copy of ``graph`` whose writes are new values; those of placeholders are returned, too.

    Writes stay to constants, to placeholders that are returned, and to memory that has a view from before the last
    write. The writes of ops that have no form without a write stay, too.
    """
    replaced = _replaceable_writes(graph)
    made, new = fx.Graph(), dict[fx.Node, fx.Node]()
    changed: dict[fx.Node, fx.Node] = {}  # a node whose memory was written to -> its value so far

    def value(node: fx.Node) -> fx.Node:
        place = replaced[node].place if node in replaced else node
        return changed.get(place) or new[place]

    for node in graph.nodes:
        if node.op == "output":
            break
        new[node] = copy = made.node_copy(node, value)
        if node in replaced:
            copy.target = replaced[node].op
            changed[replaced[node].place] = copy
    written = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder")) if n in changed}
    (results,) = graph.output_node().args
    assert isinstance(results, (tuple, list))
    output = made.output((*(changed[n] for n in written), *fx.map_arg(tuple(results), value)))
    output.meta.update(graph.output_node().meta)
    return Functional(made, tuple(written.values()))


class _Write(NamedTuple):
    """The node whose memory an in-place op writes to, and the op that returns the new value instead."""

    place: fx.Node
    op: Any


def _replaceable_writes(graph: fx.Graph) -> dict[fx.Node, _Write]:
    """Return the writes that may become new values, by their nodes."""
    memory, order = memory_groups(graph), {n: i for i, n in enumerate(graph.nodes)}
    returned = {memory[n] for n in graph.output_node().all_input_nodes}
    members: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        members.setdefault(memory[node], []).append(node)
        for group in dict.fromkeys(memory[n] for n in written_inputs(node)):
            writers.setdefault(group, []).append(node)
    found: dict[fx.Node, _Write] = {}
    for group, writes in writers.items():
        place, *others = members[group]
        views = [n for n in others if n not in writes]
        early = any(n.op != "call_function" or order[n] < order[writes[-1]] for n in views)
        ops = [_op_without_write(n, {place, *writes}) for n in writes]
        known = place.op == "call_function" or (place.op == "placeholder" and group not in returned)
        if known and not early and None not in ops:
            found |= {n: _Write(place, op) for n, op in zip(writes, ops, strict=True) if op is not None}
    return found


def _op_without_write(node: fx.Node, wholes: set[fx.Node]) -> Any:
    """Return the op that computes what ``node`` writes over the whole of one of ``wholes``; None where none does."""
    target: Any = node.target
    if not has_mutable_schema(node) or target.namespace != "aten":
        return None
    schema = schema_of(target)
    name = target.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    op: Any = getattr(packet, schema.overload_name or "default", None)
    if op is None or not node.args or node.args[0] not in wholes:
        return None
    same = [a.name for a in schema_of(op).arguments] == [a.name for a in schema.arguments]
    return op if same and list(written_inputs(node)) == [node.args[0]] else None
