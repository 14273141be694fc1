"""Open blocks: give every layer called inside a block doorways of its own (see ``ir.blocks``).

Takes a captured program, and gives one that computes the same. Each parameter goes into a block through an
``aten.alias`` for each layer that reads it there, marked with what that layer does. A parameter that several layers of
a block read, or a layer and something else, is passed in once for each of them.

A program without such blocks, or whose blocks are open already, is returned as the same object.
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
from adaptc.passes.analysis.sites import consumers, kind_of, readers
from adaptc.passes.graph.higher_order import Call, Inside, called_in, inside
from adaptc.passes.graph.lifted import Lifted, copy_graph
from adaptc.passes.graph.module_paths import module_path, owners_of
from adaptc.passes.graph.ops import CASTS, INSIDE, TABLE, argument, bound_of, mark_bound, op_of, operands
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten

#: kind -> endings of class names of layers of that kind; needed where a block does not say which module called it
_LAYERS = {
    "linear": ("Linear",),
    "addmm": ("Conv1D",),
    "embedding": ("Embedding",),
    "conv1d": ("Conv1d",),
    "conv2d": ("Conv2d",),
    "conv3d": ("Conv3d",),
    "conv_transpose": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
}


@dataclass(frozen=True)
class OpenBlocks(Pass):
    """A pass that opens blocks; its count is that of the doorways.

    ``types`` (module path -> class name) overrides what the graph's own module stacks say.
    """

    name: ClassVar[str] = "open_blocks"

    types: Mapping[str, str] = field(default_factory=dict, repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        if not has_closed_blocks(subject):
            return PassResult(subject, 0)
        sources = _parameters(subject)
        lifted = Lifted(subject)
        types = {**module_types(subject), **self.types}
        opener = _Opener(lifted, owners_of(subject), types)
        count = opener.run([lifted.nodes[n.name] for n in sources])
        return PassResult(lifted.finish(opener.module), count)


def has_closed_blocks(program: ExportedProgram) -> bool:
    """Return whether a parameter goes into a block otherwise than through a doorway."""
    return any(_calls(consumers(n), program.graph_module) for n in _parameters(program))


def _parameters(program: ExportedProgram) -> list[fx.Node]:
    specs = program.graph_signature.input_specs
    names = {s.arg.name for s in specs if s.kind == InputKind.PARAMETER}
    return [n for n in program.graph.find_nodes(op="placeholder") if n.name in names]


def _calls(found: Any, module: fx.GraphModule) -> list[Call]:
    calls = [Call.of(n, module) for n, source in found if inside(source) is None]
    return list({c.node: c for c in calls if c is not None}.values())


@dataclass(frozen=True, eq=False)
class _Leaf:
    """A node that reads a parameter inside a block.

    ``read`` is the node that it reads there. ``path`` has the calls around it and the position of the parameter in
    each, outermost first.
    """

    node: fx.Node
    read: fx.Node
    path: tuple[tuple[Call, int], ...]


@dataclass(frozen=True)
class _Key:
    """The key of a doorway, which all leaves with an equal key share.

    ``partner`` is the placeholder of a weight's bias, or of a bias's weight. It is "" for no bias, and None where the
    block computes the bias.
    """

    role: str
    owner: str | None
    kind: str = "weight"
    op: tuple[str, tuple[Any, ...]] | None = None
    partner: str | None = ""
    rivals: tuple[str, ...] = ()
    bound: tuple[float, float] | None = None


class _Opener:
    """The opening of one program; ``calls`` are the calls in its own graph whose blocks were copied to be changed."""

    def __init__(self, lifted: Lifted, known: Collection[str], types: Mapping[str, str]) -> None:
        self.lifted, self.known, self.types = lifted, known, types
        # A second module that holds the bodies while the graph is edited, so that the program's own stays as it is.
        self.module = copy_of(lifted.program.graph_module, lifted.graph)
        self.calls: list[Call] = []
        self.sources: set[fx.Node] = set()
        self.doorways: dict[tuple[fx.Node, str, _Key], fx.Node] = {}

    def run(self, sources: list[fx.Node]) -> int:
        self.sources = set(sources)
        self.calls = _calls((pair for s in sources for pair in consumers(s)), self.module)
        for call in self.calls:
            own_bodies(call)
        pairs = [(call, source) for call in self.calls for source in sources]
        groups = [(call, source, self._groups(call, source)) for call, source in pairs]
        for call, source, found in groups:
            for i, (key, leaves) in enumerate(found.items()):
                self.doorways[call.node, source.name, key] = self._doorway(call, source, leaves, i + 1 == len(found))
        for (node, source, key), door in self.doorways.items():
            bias: str | None = "" if key.partner == "" else None
            if key.role == "weight" and key.partner:
                bias = self.doorways[node, key.partner, replace(key, role="bias", partner=source)].name
            kind, op = (key.kind, key.op) if key.role == "weight" else ("weight", None)
            fact = Inside(key.owner, kind, op, bias, key.rivals)
            door.meta["custom"] = {INSIDE: fact.to_meta()}
            if key.bound is not None:
                mark_bound(door, key.bound)
        return len(self.doorways)

    # -- who reads what ------------------------------------------------------------------------------------------------

    def _groups(self, call: Call, source: fx.Node) -> dict[_Key, list[_Leaf]]:
        out: dict[_Key, list[_Leaf]] = {}
        for leaf in _leaves(call, source):
            out.setdefault(self._key(leaf, source), []).append(leaf)
        return out

    def _key(self, leaf: _Leaf, source: fx.Node) -> _Key:
        node, traced = leaf.node, called_in(leaf.node, self.known)
        _, w, b = operands(node) if node.target in TABLE else (None, None, None)
        weight = self._origin(w, leaf.path)
        if w is not None and b is leaf.read and weight is not None and self._kind(node, w, weight) != "weight":
            return replace(self._key(_Leaf(node, w, leaf.path), weight), role="bias", partner=weight.name)
        kind = self._kind(node, leaf.read, source)
        if kind == "weight":
            owner = traced if traced is not None else module_path(leaf.path[0][0].node, self.known)
            return _Key("weight", owner, bound=bound_of(node))
        owner, rivals = self._owner(traced, kind, node, source, leaf.path)
        if node.target not in TABLE:
            return _Key("weight", owner, kind, rivals=rivals)
        origin = self._origin(b, leaf.path)
        partner = "" if b is None else None if origin is None else origin.name
        op = op_of(kind, source.meta["val"], node)
        return _Key("weight", owner, kind, (str(op.target), op.rest), partner, rivals, op.bound)

    @staticmethod
    def _kind(node: fx.Node, read: fx.Node, source: fx.Node) -> str:
        return kind_of(node, read, source.meta["val"].ndim)

    def _owner(
        self, traced: str | None, kind: str, node: fx.Node, source: fx.Node, path: tuple[tuple[Call, int], ...]
    ) -> tuple[str | None, tuple[str, ...]]:
        """Return the path of the module that called ``node``, and the names of the parameters that may be meant.

        The names are () where only one is possible. Blocks of control flow do not say who called. There it is a layer
        whose class has this kind and whose bias is the one added. Where no layer fits, it is the block's own module.
        """
        if traced is not None:
            return traced, ()
        origin = self._origin(operands(node)[2] if node.target in TABLE else argument(node, 2), path)
        fitting = []
        for fqn in self.lifted.fqns(source):
            module, _, param = fqn.rpartition(".")
            type_of = self.types.get(module, "")
            own = self.lifted.placeholders.get(f"{module}.bias")
            if param == "weight" and (not type_of or type_of.endswith(_LAYERS[kind])) and own is origin:
                fitting.append(fqn)
        if not fitting:
            return module_path(path[0][0].node, self.known), ()
        return fitting[0].rpartition(".")[0], tuple(fitting) if len(fitting) > 1 else ()

    def _origin(self, node: Any, path: tuple[tuple[Call, int], ...]) -> fx.Node | None:
        """Return the parameter that a block's node shows, through casts and the calls around it; None if computed."""
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
                node = node.args[0] if node.target in CASTS or inside(node) else None
        return None

    # -- edits ---------------------------------------------------------------------------------------------------------

    def _doorway(self, call: Call, source: fx.Node, leaves: list[_Leaf], last: bool) -> fx.Node:
        at = leaves[0].path[0][1]
        handed = next(n for i, n, _ in call.operands() if i == at)
        with self.lifted.graph.inserting_before(call.node):
            door = self.lifted.graph.call_function(aten.alias.default, (handed,))
        inherited = {k: call.node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in call.node.meta}
        door.meta = {**inherited, "val": handed.meta["val"], "torch_fn": (door.name, "alias")}
        self.lifted.nodes[door.name] = door
        for at in dict.fromkeys(leaf.path[0][1] for leaf in leaves):
            _hand_in(call, at, door, {leaf.node for leaf in leaves})
        return door


def _leaves(call: Call, source: fx.Node) -> Iterator[_Leaf]:
    """Yield the nodes that read the parameter ``source`` inside the blocks of ``call``."""
    for at, handed, fixed in call.operands():
        if fixed and _root(handed) is source:
            for body in call.bodies():
                for leaf in _inner(body, at):
                    yield _Leaf(leaf.node, leaf.read, ((call, at), *leaf.path))


def _inner(body: fx.GraphModule, at: int) -> Iterator[_Leaf]:
    source = body.graph.find_nodes(op="placeholder")[at]
    for user, read in consumers(source):
        call = Call.of(user, body)
        if call is None:
            yield _Leaf(user, read, ())
            continue
        for i, handed, fixed in call.operands():
            if handed is read and fixed:
                for inner in call.bodies():
                    for leaf in _inner(inner, i):
                        yield _Leaf(leaf.node, leaf.read, ((call, i), *leaf.path))
            elif handed is read:
                yield _Leaf(user, read, ())


def _root(node: fx.Node) -> fx.Node:
    while node.target in CASTS and isinstance(node.args[0], fx.Node) and inside(node) is None:
        node = node.args[0]
    return node


def _hand_in(call: Call, at: int, value: fx.Node, mine: set[fx.Node]) -> None:
    """Let the nodes in ``mine`` that read operand ``at`` of a call inside its blocks read ``value`` instead."""
    everyone = {leaf.node for body in call.bodies() for leaf in _inner(body, at)}
    if everyone <= mine:
        call.set(at, value)
        return
    new = call.count()
    call.set(new, value)
    for body in call.bodies():
        old, twin = body.graph.find_nodes(op="placeholder")[at], _placeholder(body.graph, value)
        pairs = list(consumers(old))
        for reader in readers(body.graph, old, {n for n, _ in pairs if n in mine}):
            reader.replace_input_with(old, twin)
        for user, read in pairs:
            inner = Call.of(user, body)
            if inner is None:
                continue
            for i, handed, fixed in list(inner.operands()):
                if handed is read and fixed and {x.node for b in inner.bodies() for x in _inner(b, i)} & mine:
                    _hand_in(inner, i, twin if read is old else _cast_like(read, old, twin), mine)
        body.recompile()


def _placeholder(graph: fx.Graph, like: fx.Node) -> fx.Node:
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


def own_bodies(call: Call) -> None:
    call.own_bodies(lambda body: copy_of(body, copy_graph(body.graph)))
    for body in call.bodies():
        for node in body.graph.nodes:
            inner = Call.of(node, body)
            if inner is not None:
                own_bodies(inner)


def copy_of(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a module of ``graph``, with the tensors and block bodies of ``module``."""
    new = fx.GraphModule(module, graph)
    new.meta.update(module.meta)
    return new
