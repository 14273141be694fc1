"""Cut out the part of a program that computes some of its outputs, with the inputs that it needs and no others.

The outputs of the program must be a dict of tensors. The nodes of the part keep their names. The part also has the
nodes that write to memory it reads, and the assertions on values it reads. The program is not changed, and shares its
tensors with the part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import ConfigError, shown
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.mutation import memory_groups, pure, written


def outputs_of(program: ExportedProgram) -> list[str]:
    """Return the names of a program's outputs; an empty list unless they are a dict of tensors."""
    spec = program.call_spec.out_spec
    named = spec is not None and spec.type is dict and all(c.is_leaf() for c in spec.children())
    return [str(n) for n in spec.context] if named else []  # type: ignore[union-attr]


def part_of(program: ExportedProgram, names: Sequence[str]) -> ExportedProgram:
    """Return the part of a program that computes the outputs ``names``. Raises ConfigError for an unknown name."""
    known = outputs_of(program)
    if lost := [n for n in names if n not in known]:
        raise ConfigError(f"the program has no output {shown(lost[0])}; it has {known}")
    opened = Lifted(program)
    graph, chosen = opened.graph, opened.user_outputs([known.index(n) for n in names])
    _read_sizes_inside(graph, _needed(graph, chosen, sizes=False))
    needed = _needed(graph, chosen, sizes=True)
    opened.keep(needed, chosen)
    return opened.finish_part(names)


def cut_to(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Reduce a graph to the computation of these nodes, which become its outputs. All its inputs stay."""
    _read_sizes_inside(graph, _needed(graph, nodes, sizes=False))
    kept, last = _needed(graph, nodes, sizes=True), graph.output_node()
    last.args = (tuple(nodes),)
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node is not last and node not in kept:
            graph.erase_node(node)


def _needed(graph: fx.Graph, roots: Collection[fx.Node], sizes: bool) -> set[fx.Node]:
    """Return the nodes that ``roots`` depend on; without ``sizes``, not the inputs that only a size is read from."""
    memory, found = memory_groups(graph), set[fx.Node]()
    acting = [n for n in graph.nodes if n.op == "call_function" and not pure(n)]

    def take(node: fx.Node) -> None:
        todo = [node]
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo += one.all_input_nodes if sizes or not _is_size(one) else ()

    for node in roots:
        take(node)
    while True:
        read = {memory[n] for n in found}
        new = [n for n in acting if n not in found and _belongs(n, found, {memory[w] for w in written(n)} & read)]
        if not new:
            return found
        for node in new:
            take(node)


def _belongs(node: fx.Node, found: Collection[fx.Node], writes: Collection[Any]) -> bool:
    """Return whether a node with an effect belongs to a part, given the part's nodes that are ``found`` so far.

    ``writes`` is the memory of the part that it writes to. A node without users that only checks values of the part
    belongs to it, too.
    """
    if writes:
        return True
    inputs = node.all_input_nodes
    return not node.users and bool(inputs) and not list(written(node)) and all(n in found for n in inputs)


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def _read_sizes_inside(graph: fx.Graph, inside: Collection[fx.Node]) -> None:
    """Read sizes from inputs in ``inside``, where one of them has the same symbolic size."""
    where: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node in inside and isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int):
                    where.setdefault(str(size), (node, axis))
    for node in graph.nodes:
        if node in inside and _is_size(node) and node.args[0] not in inside:
            same = where.get(str(node.meta["val"]))
            if same is not None:
                node.args = same
