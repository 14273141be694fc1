"""Expose the parameters of subgraphs: give every layer called in a subgraph inputs of its own (``graph.higher_order``).

Takes a captured program, and gives one that computes the same. Each parameter goes into a subgraph through an
``aten.alias`` for each layer that reads it there, marked with what that layer does. A parameter that several layers of
a subgraph read, or a layer and something else, is passed in once for each of them.

A program without subgraphs, or whose subgraphs have exposed parameters already, is returned as the same object.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.passes.analysis.program_facts import module_types
from adaptc.passes.analysis.sites import find_consumers, isolate_readers, layer_kind_of
from adaptc.passes.graph.higher_order import (
    HigherOrderCall,
    SubgraphInput,
    copy_bodies,
    module_with_graph,
    subgraph_input_of,
    subgraph_module_path,
)
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.module_paths import module_path, program_module_paths
from adaptc.passes.graph.ops import (
    CASTS,
    LAYER_OPS,
    SUBGRAPH_INPUT_META,
    argument,
    mark_max_norm,
    max_norm_of,
    op_of,
    operands,
)
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten

#: kind -> endings of class names of layers of that kind; needed where a subgraph does not say which module called it
_LAYER_CLASSES = {
    "linear": ("Linear",),
    "addmm": ("Conv1D",),
    "embedding": ("Embedding",),
    "conv1d": ("Conv1d",),
    "conv2d": ("Conv2d",),
    "conv3d": ("Conv3d",),
    "conv_transpose": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
}


@dataclass(frozen=True)
class ExposeSubgraphParams(Pass):
    """A pass that exposes the parameters of subgraphs; its count is that of the subgraph inputs.

    ``class_names`` (module path -> class name) overrides what the graph's own module stacks say.
    """

    name: ClassVar[str] = "expose_subgraph_params"

    class_names: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        if not has_unexposed_params(subject):
            return PassResult(subject, 0)
        sources = _parameter_nodes(subject)
        lifted = LiftedProgram(subject)
        types = {**module_types(subject), **self.class_names}
        opener = _ParamExposer(lifted, program_module_paths(subject), types)
        count = opener.run([lifted.nodes[n.name] for n in sources])
        return PassResult(lifted.finish(opener.module), count)


def has_unexposed_params(program: ExportedProgram) -> bool:
    """Return whether a parameter goes into a subgraph otherwise than through a subgraph input."""
    return any(_unexposed_calls(find_consumers(n), program.graph_module) for n in _parameter_nodes(program))


def _parameter_nodes(program: ExportedProgram) -> list[fx.Node]:
    specs = program.graph_signature.input_specs
    names = {s.arg.name for s in specs if s.kind == InputKind.PARAMETER}
    return [n for n in program.graph.find_nodes(op="placeholder") if n.name in names]


def _unexposed_calls(found: Any, module: fx.GraphModule) -> list[HigherOrderCall]:
    calls = [HigherOrderCall.from_node(n, module) for n, source in found if subgraph_input_of(source) is None]
    return list({c.node: c for c in calls if c is not None}.values())


@dataclass(frozen=True, eq=False)
class _SubgraphRead:
    """A node that reads a parameter in a subgraph.

    ``read_node`` is the node that it reads there. ``path`` has the calls around it and the position of the parameter in
    each, outermost first.
    """

    node: fx.Node
    read_node: fx.Node
    path: tuple[tuple[HigherOrderCall, int], ...]


@dataclass(frozen=True)
class _SubgraphInputKey:
    """The key of a subgraph input, which all leaves with an equal key share.

    ``paired_param`` is the placeholder of a weight's bias, or of a bias's weight. It is "" for no bias, and None where
    the subgraph computes the bias.
    """

    role: str
    owner: str | None
    kind: str = "weight"
    op: tuple[str, tuple[Any, ...]] | None = None
    paired_param: str | None = ""
    candidates: tuple[str, ...] = ()
    max_norm: tuple[float, float] | None = None


class _ParamExposer:
    """Exposes the parameters of one program; ``calls`` are the calls in its own graph whose subgraphs were copied to be
    changed."""

    def __init__(self, lifted: LiftedProgram, module_paths: Collection[str], types: Mapping[str, str]) -> None:
        self.lifted, self.module_paths, self.class_names = lifted, module_paths, types
        # A second module that holds the bodies while the graph is edited, so that the program's own stays as it is.
        self.module = module_with_graph(lifted.program.graph_module, lifted.graph)
        self.calls: list[HigherOrderCall] = []
        self.sources: set[fx.Node] = set()
        self.subgraph_inputs: dict[tuple[fx.Node, str, _SubgraphInputKey], fx.Node] = {}

    def run(self, sources: list[fx.Node]) -> int:
        self.sources = set(sources)
        self.calls = _unexposed_calls((pair for s in sources for pair in find_consumers(s)), self.module)
        for call in self.calls:
            copy_bodies(call)
        pairs = [(call, source) for call in self.calls for source in sources]
        groups = [(call, source, self._reads_by_key(call, source)) for call, source in pairs]
        for call, source, found in groups:
            for i, (key, leaves) in enumerate(found.items()):
                self.subgraph_inputs[call.node, source.name, key] = self._add_subgraph_input(
                    call, source, leaves, i + 1 == len(found)
                )
        for (node, source, key), subgraph_input in self.subgraph_inputs.items():
            bias: str | None = "" if key.paired_param == "" else None
            if key.role == "weight" and key.paired_param:
                bias = self.subgraph_inputs[node, key.paired_param, replace(key, role="bias", paired_param=source)].name
            kind, op = (key.kind, key.op) if key.role == "weight" else ("weight", None)
            fact = SubgraphInput(key.owner, kind, op, bias, key.candidates)
            subgraph_input.meta["custom"] = {SUBGRAPH_INPUT_META: fact.to_meta()}
            if key.max_norm is not None:
                mark_max_norm(subgraph_input, key.max_norm)
        return len(self.subgraph_inputs)

    # -- who reads what ------------------------------------------------------------------------------------------------

    def _reads_by_key(self, call: HigherOrderCall, source: fx.Node) -> dict[_SubgraphInputKey, list[_SubgraphRead]]:
        out: dict[_SubgraphInputKey, list[_SubgraphRead]] = {}
        for leaf in _reads_in_call(call, source):
            out.setdefault(self._key(leaf, source), []).append(leaf)
        return out

    def _key(self, subgraph_read: _SubgraphRead, source: fx.Node) -> _SubgraphInputKey:
        node, traced_owner = subgraph_read.node, subgraph_module_path(subgraph_read.node, self.module_paths)
        _, w, b = operands(node) if node.target in LAYER_OPS else (None, None, None)
        weight = self._source_parameter(w, subgraph_read.path)
        if (
            w is not None
            and b is subgraph_read.read_node
            and weight is not None
            and self._kind(node, w, weight) != "weight"
        ):
            return replace(
                self._key(_SubgraphRead(node, w, subgraph_read.path), weight), role="bias", paired_param=weight.name
            )
        kind = self._kind(node, subgraph_read.read_node, source)
        if kind == "weight":
            owner = (
                traced_owner
                if traced_owner is not None
                else module_path(subgraph_read.path[0][0].node, self.module_paths)
            )
            return _SubgraphInputKey("weight", owner, max_norm=max_norm_of(node))
        owner, rivals = self._owner(traced_owner, kind, node, source, subgraph_read.path)
        if node.target not in LAYER_OPS:
            return _SubgraphInputKey("weight", owner, kind, candidates=rivals)
        origin = self._source_parameter(b, subgraph_read.path)
        partner = "" if b is None else None if origin is None else origin.name
        op = op_of(kind, source.meta["val"], node)
        return _SubgraphInputKey("weight", owner, kind, (str(op.target), op.other_args), partner, rivals, op.max_norm)

    @staticmethod
    def _kind(node: fx.Node, read: fx.Node, source: fx.Node) -> str:
        return layer_kind_of(node, read, source.meta["val"].ndim)

    def _owner(
        self,
        traced_owner: str | None,
        kind: str,
        node: fx.Node,
        source: fx.Node,
        path: tuple[tuple[HigherOrderCall, int], ...],
    ) -> tuple[str | None, tuple[str, ...]]:
        """Return the path of the module that called ``node``, and the names of the parameters that may be meant.

        The names are () where only one is possible. Subgraphs of control flow do not say who called. There it is a
        layer whose class has this kind and whose bias is the one added. Where no layer fits, it is the subgraph's own
        module.
        """
        if traced_owner is not None:
            return traced_owner, ()
        origin = self._source_parameter(operands(node)[2] if node.target in LAYER_OPS else argument(node, 2), path)
        fitting: list[str] = []
        for fqn in self.lifted.fqns_of(source):
            module, _, param = fqn.rpartition(".")
            type_of = self.class_names.get(module, "")
            own = self.lifted.placeholders.get(f"{module}.bias")
            if param == "weight" and (not type_of or type_of.endswith(_LAYER_CLASSES[kind])) and own is origin:
                fitting.append(fqn)
        if not fitting:
            return module_path(path[0][0].node, self.module_paths), ()
        return fitting[0].rpartition(".")[0], tuple(fitting) if len(fitting) > 1 else ()

    def _source_parameter(self, node: Any, path: tuple[tuple[HigherOrderCall, int], ...]) -> fx.Node | None:
        """Return the parameter that a subgraph's node shows, through casts and the calls around it; None if
        computed."""
        around = list(path)
        while isinstance(node, fx.Node):
            if node.op == "placeholder":
                if not around:
                    return node if node in self.sources else None
                call, _ = around.pop()
                at = [n.name for n in node.graph.find_nodes(op="placeholder")].index(node.name)
                handed = {i: n for i, n, fixed in call.operands() if fixed}
                node = handed.get(at)
            else:
                node = node.args[0] if node.target in CASTS or subgraph_input_of(node) else None
        return None

    # -- edits ---------------------------------------------------------------------------------------------------------

    def _add_subgraph_input(
        self, call: HigherOrderCall, source: fx.Node, reads: list[_SubgraphRead], last: bool
    ) -> fx.Node:
        position = reads[0].path[0][1]
        handed = next(n for i, n, _ in call.operands() if i == position)
        with self.lifted.graph.inserting_before(call.node):
            door = self.lifted.graph.call_function(aten.alias.default, (handed,))
        inherited = {k: call.node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in call.node.meta}
        door.meta = {**inherited, "val": handed.meta["val"], "torch_fn": (door.name, "alias")}
        self.lifted.nodes[door.name] = door
        for position in dict.fromkeys(leaf.path[0][1] for leaf in reads):
            _replace_operand(call, position, door, {leaf.node for leaf in reads})
        return door


def _reads_in_call(call: HigherOrderCall, source: fx.Node) -> Iterator[_SubgraphRead]:
    """Yield the nodes that read the parameter ``source`` in the subgraphs of ``call``."""
    for at, handed, fixed in call.operands():
        if fixed and _without_casts(handed) is source:
            for body in call.bodies():
                for leaf in _reads_in_body(body, at):
                    yield _SubgraphRead(leaf.node, leaf.read_node, ((call, at), *leaf.path))


def _reads_in_body(body: fx.GraphModule, position: int) -> Iterator[_SubgraphRead]:
    source = body.graph.find_nodes(op="placeholder")[position]
    for user, read in find_consumers(source):
        call = HigherOrderCall.from_node(user, body)
        if call is None:
            yield _SubgraphRead(user, read, ())
            continue
        for i, handed, fixed in call.operands():
            if handed is read and fixed:
                for inner in call.bodies():
                    for leaf in _reads_in_body(inner, i):
                        yield _SubgraphRead(leaf.node, leaf.read_node, ((call, i), *leaf.path))
            elif handed is read:
                yield _SubgraphRead(user, read, ())


def _without_casts(node: fx.Node) -> fx.Node:
    while node.target in CASTS and isinstance(node.args[0], fx.Node) and subgraph_input_of(node) is None:
        node = node.args[0]
    return node


def _replace_operand(call: HigherOrderCall, position: int, value: fx.Node, chosen_readers: set[fx.Node]) -> None:
    """Let the nodes in ``chosen_readers`` that read operand ``position`` of a call in its subgraphs read ``value``
    instead."""
    everyone = {leaf.node for body in call.bodies() for leaf in _reads_in_body(body, position)}
    if everyone <= chosen_readers:
        call.set_operand(position, value)
        return
    new = call.operand_count()
    call.set_operand(new, value)
    for body in call.bodies():
        old, new_input = body.graph.find_nodes(op="placeholder")[position], _add_placeholder(body.graph, value)
        pairs = list(find_consumers(old))
        for reader in isolate_readers(body.graph, old, {n for n, _ in pairs if n in chosen_readers}):
            reader.replace_input_with(old, new_input)
        for user, read in pairs:
            inner = HigherOrderCall.from_node(user, body)
            if inner is None:
                continue
            for i, handed, fixed in list(inner.operands()):
                if (
                    handed is read
                    and fixed
                    and {x.node for b in inner.bodies() for x in _reads_in_body(b, i)} & chosen_readers
                ):
                    _replace_operand(
                        inner, i, new_input if read is old else _cast_like(read, old, new_input), chosen_readers
                    )
        body.recompile()


def _add_placeholder(graph: fx.Graph, like: fx.Node) -> fx.Node:
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        node = graph.placeholder(like.name)
    node.meta["val"] = like.meta["val"]
    return node


def _cast_like(read: fx.Node, old: fx.Node, twin: fx.Node) -> fx.Node:
    """Copy the casts between ``old`` and ``read`` to follow ``twin``, and return the last copy."""
    source: Any = read.args[0]
    below = twin if source is old else _cast_like(source, old, twin)
    with read.graph.inserting_after(read):
        return read.graph.node_copy(read, lambda n: below if n is source else n)
