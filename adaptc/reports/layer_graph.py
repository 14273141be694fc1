"""Report the nodes of one adapted layer, before the rewrite and after it: the base's op, the adapter's nodes, their
sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase
from typing import Any

from torch import Tensor, fx

from adaptc.errors import ConfigError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import fqns_by_placeholder
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import node_tag, region_tag
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.program_repr import attachment_ids_at
from adaptc.tables import Report, Table
from adaptc.torch_typing import named_modules

#: what a node is: an input or the output of the layer, the base's op and its weights, a tensor of the adapter, a node
#: of the adapter, or the node whose value stands for the base's
INPUT, BASE, TENSOR, ADAPTER, SUM = "input", "base", "tensor", "adapter", "sum"
#: the name of the node that stands for the readers of the layer
OUTPUT = "output"


@dataclass(frozen=True)
class LayerNode:
    """A node: its ``name`` in the graph, a short ``label``, its sizes as text, its role, and the names it reads."""

    name: str
    label: str
    sizes: str
    role: str
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class LayerGraph(Report):
    """A report of the nodes at the parameter ``site``, in the order in which they run. ``heading`` names the method."""

    ROWS = ("nodes",)

    site: str
    heading: str
    before: Sequence[LayerNode]
    after: Sequence[LayerNode]

    @classmethod
    @with_graph_lock
    def from_program(cls, program: AdaptedProgram, site: str | None) -> LayerGraph:
        """Return the nodes at a parameter or module; None for the first site.

        Raises ConfigError where the program has no adapter there, or none at a layer.
        """
        still = program.snapshot()
        ids = attachment_ids_at(still, site)
        attachments = [a for a in still.adaptation.attachments if (ids is None or a.id in ids) and a.consumers]
        if not attachments:
            raise ConfigError(
                "the program has no adapter at a layer: it was merged or unloaded, or adapts inputs, not weights"
            )
        attachments = [a for a in attachments if a.fqn == attachments[0].fqn]
        return _LayerReader(still, attachments).read()

    def sections(self) -> list[str | Table]:
        rows = [(n.name, n.label, n.sizes, n.role, ", ".join(n.inputs)) for n in self.after]
        return [f"{self.site}: {self.heading}", Table(["node", "op", "sizes", "role", "reads"], rows)]

    def values(self) -> dict[str, Any]:
        """Return ``site``, ``heading`` and ``nodes``: a dict for each, with ``when`` "before" or "after"."""
        nodes = [{"when": w, **vars(n)} for w, found in (("before", self.before), ("after", self.after)) for n in found]
        return {"site": self.site, "heading": self.heading, "nodes": nodes}


class _LayerReader:
    """A reader of the nodes at one layer of a program."""

    def __init__(self, program: AdaptedProgram, attachments: Sequence[Attachment]) -> None:
        self.attachments, self.ids = attachments, {a.id for a in attachments}
        self.names = fqns_by_placeholder(program.graph_signature)
        self.slots = {f: name for a in attachments for name, f in a.slots.items()}
        self.slots |= {a.scale_slot: "scale" for a in attachments if a.scale_slot}
        self.graph, self.consumer = self._find_consumer(program.graph_module, attachments[0].consumers[0])
        #: the model's own nodes: the reader of the weight, and the block that gets the weight by it
        self.layer = [self.consumer]
        if len(self.consumer.users) == 1 and _is_block(user := next(iter(self.consumer.users))):
            self.layer.append(user)
        self._letters: dict[str, str] = {}
        self._new_letters = (f"{c}{n or ''}" for n in count() for c in ascii_lowercase)

    def read(self) -> LayerGraph:
        results = [n for n in self.graph.nodes if (t := region_tag(n)) and self._is_here(t)]
        if not results:
            raise ConfigError(f"the nodes of {self.attachments[0].fqn!r} were replaced by fused kernels")
        inside = self._tagged_nodes_before(results)
        bases = {n.name: str(tag["base"]) for n in results if (tag := region_tag(n))}
        last = self._last(results)
        after = [n for n in self.graph.nodes if n in inside or n in self.layer]
        methods = dict.fromkeys(a.method.name for a in self.attachments)
        names = ", ".join(repr(a.adapter) for a in self.attachments)
        heading = f"{' + '.join(methods)}, adapter{'s' if len(self.attachments) > 1 else ''} {names}"
        originals = {n: [self._original(i, bases) for i in _values_read(n)] for n in self.layer}
        outside = dict.fromkeys(i for read in originals.values() for i in read if i not in self.layer)
        before = [
            *self._leaves(outside),
            *(self._layer_node(n, BASE, read) for n, read in originals.items()),
            LayerNode(OUTPUT, OUTPUT, self._sizes(self.layer[-1]), INPUT, (self.layer[-1].name,)),
        ]
        outside = dict.fromkeys(i for n in after for i in _values_read(n) if i not in after)
        nodes = [
            *self._leaves(outside),
            *(self._layer_node(n, self._role(n, results), _values_read(n)) for n in after),
            LayerNode(OUTPUT, OUTPUT, self._sizes(last), INPUT, (last.name,)),
        ]
        return LayerGraph(self.attachments[0].fqn, heading, tuple(before), tuple(nodes))

    def _find_consumer(self, module: fx.GraphModule, name: str) -> tuple[fx.Graph, fx.Node]:
        graphs = [m.graph for _, m in named_modules(module) if isinstance(m, fx.GraphModule)]
        found = [(g, n) for g in graphs for n in g.nodes if n.name == name]
        tagged = [(g, n) for g, n in found if any((t := region_tag(r)) and self._is_at(t, name) for r in g.nodes)]
        if not found:
            raise ConfigError(f"the nodes of {self.attachments[0].fqn!r} were replaced by fused kernels")
        return (tagged or found)[0]

    def _is_at(self, tag: Mapping[str, Any], consumer: str) -> bool:
        return tag["site"] in self.ids and consumer in (tag.get("node"), tag.get("base"))

    def _is_here(self, tag: Mapping[str, Any]) -> bool:
        return self._is_at(tag, self.consumer.name) or (
            tag["site"] in self.ids and len(self.attachments[0].consumers) == 1
        )

    def _node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)

    def _tagged_nodes_before(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        """Return the adapters' nodes that ``results`` are computed of, with these."""
        found, left = set[fx.Node](), list(results)
        while left:
            node = left.pop()
            tag = node_tag(node)
            if node not in found and tag is not None and tag["site"] in self.ids:
                found.add(node)
                left += node.all_input_nodes
        return found

    def _original(self, node: fx.Node, bases: Mapping[str, str]) -> fx.Node:
        """Return the node that the model has in the place of ``node``."""
        while node.name in bases:
            node = self._node(bases[node.name])
        return node

    def _last(self, results: Sequence[fx.Node]) -> fx.Node:
        """Return the node whose value is the layer's: the last region around it, or the layer itself."""
        order = list(self.graph.nodes)
        behind = [n for n in results if order.index(n) > order.index(self.layer[-1])]
        return behind[-1] if behind else self.layer[-1]

    def _role(self, node: fx.Node, results: Sequence[fx.Node]) -> str:
        return BASE if node in self.layer else SUM if node in results else ADAPTER

    def _leaves(self, nodes: Iterable[fx.Node]) -> list[LayerNode]:
        found: list[LayerNode] = []
        for node in nodes:
            fqn = self.names.get(node.name)
            if fqn in self.slots:
                label, role = self.slots[fqn], TENSOR
            elif fqn is not None:
                label, role = fqn.rpartition(".")[2], BASE
            else:
                is_input = node.op == "placeholder" or any(node in n.all_input_nodes for n in self.layer)
                label, role = (INPUT if is_input else _op_name(node)), INPUT
            found.append(LayerNode(node.name, label, self._sizes(node), role))
        return found

    def _layer_node(self, node: fx.Node, role: str, inputs: Iterable[fx.Node]) -> LayerNode:
        return LayerNode(
            node.name, _op_name(node), self._sizes(node), role, tuple(dict.fromkeys(n.name for n in inputs))
        )

    def _sizes(self, node: fx.Node) -> str:
        """Return the sizes of a node's value, with a letter for each free size; '' for what is no tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ""
        return " x ".join(self._size(n) for n in value.shape) or "one number"

    def _size(self, size: Any) -> str:
        text = str(size)
        if text.isdecimal():
            return text
        if text not in self._letters:
            self._letters[text] = next(self._new_letters)
        return self._letters[text]


def _values_read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values ``node`` reads, without the graphs of blocks."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _is_block(node: fx.Node) -> bool:
    """Return whether a node calls a graph of its own, as the blocks of ``torch.no_grad`` do."""
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _op_name(node: fx.Node) -> str:
    """Return the short name of a node's op: ``linear`` for ``aten.linear.default``."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = getattr(packet, "__name__", None) or getattr(target, "__name__", None) or str(target)
    return str(name).strip("_")
