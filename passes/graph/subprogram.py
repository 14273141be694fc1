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

from adaptc.errors import ConfigError, short_repr
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import has_effect, is_pure, memory_groups, written_inputs
from adaptc.torch_typing import shape_of


def output_names(program: ExportedProgram) -> list[str]:
    """Return the names of a program's outputs; an empty list unless they are a dict of tensors."""
    spec = program.call_spec.out_spec
    named = spec is not None and spec.type is dict and all(c.is_leaf() for c in spec.children())
    return [str(n) for n in spec.context] if named else []  # type: ignore[union-attr]


def extract_subprogram(program: ExportedProgram, names: Sequence[str]) -> ExportedProgram:
    """Return the part of a program that computes the outputs ``names``. Raises ConfigError for an unknown name."""
    all_names = output_names(program)
    if lost := [n for n in names if n not in all_names]:
        raise ConfigError(f"the program has no output {short_repr(lost[0])}; it has {all_names}")
    opened = LiftedProgram(program)
    graph, output_nodes = opened.graph, opened.user_outputs([all_names.index(n) for n in names])
    _redirect_size_reads(graph, _find_needed(graph, output_nodes, sizes=False))
    needed = _find_needed(graph, output_nodes, sizes=True)
    opened.keep_only(needed, output_nodes)
    return opened.finish_subprogram(dict.fromkeys(names, 0))


def reduce_graph_to(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Reduce a graph to the computation of these nodes, which become its outputs. All its inputs stay."""
    _redirect_size_reads(graph, _find_needed(graph, nodes, sizes=False))
    needed, last = _find_needed(graph, nodes, sizes=True), graph.output_node()
    last.args = (tuple(nodes),)
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node is not last and node not in needed:
            graph.erase_node(node)


def _find_needed(graph: fx.Graph, roots: Collection[fx.Node], sizes: bool) -> set[fx.Node]:
    """Return the nodes that ``roots`` depend on; without ``sizes``, not the inputs that only a size is read from."""
    memory, needed = memory_groups(graph), set[fx.Node]()
    effect_nodes = [n for n in graph.nodes if n.op == "call_function" and not is_pure(n)]

    def add_with_inputs(node: fx.Node) -> None:
        todo = [node]
        while todo:
            one = todo.pop()
            if one not in needed:
                needed.add(one)
                todo += one.all_input_nodes if sizes or not _reads_input_size(one) else ()

    for node in roots:
        add_with_inputs(node)
    while True:
        read = {memory[n] for n in needed}
        new = [
            n
            for n in effect_nodes
            if n not in needed and _is_needed_effect(n, needed, {memory[w] for w in written_inputs(n)} & read)
        ]
        if not new:
            return needed
        for node in new:
            add_with_inputs(node)


def _is_needed_effect(node: fx.Node, needed: Collection[fx.Node], written_memory: Collection[Any]) -> bool:
    """Return whether a node with an effect belongs to a part, given the part's nodes that are ``needed`` so far.

    ``written_memory`` is the memory of the part that it writes to. A node without users that only checks values of the
    part belongs to it, too.
    """
    if written_memory:
        return True
    inputs = node.all_input_nodes
    if node.users or not inputs or list(written_inputs(node)):
        return False
    return all(n in needed for n in inputs) or _checks_inputs(node, needed)


def _checks_inputs(node: fx.Node, needed: Collection[fx.Node]) -> bool:
    """Return whether a check follows from inputs in ``needed`` alone, through nodes that nothing else needs."""
    todo, seen = list(node.all_input_nodes), set[fx.Node]()
    while todo:
        one = todo.pop()
        if one in seen or one in needed:
            continue
        if not one.all_input_nodes or has_effect(one):
            return False
        seen.add(one)
        todo += one.all_input_nodes
    return True


def _reads_input_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def _redirect_size_reads(graph: fx.Graph, needed: Collection[fx.Node]) -> None:
    """Read sizes from inputs in ``needed``, where one of them has the same symbolic size."""
    size_sources: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node in needed and isinstance(value, Tensor):
            for axis, size in enumerate(shape_of(value)):
                if not isinstance(size, int):
                    size_sources.setdefault(str(size), (node, axis))
    for node in graph.nodes:
        if node in needed and _reads_input_size(node) and node.args[0] not in needed:
            same = size_sources.get(str(node.meta["val"]))
            if same is not None:
                node.args = same
