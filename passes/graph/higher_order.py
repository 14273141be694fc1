"""Calls inside blocks: the code that ``torch.no_grad``, autocast, ``torch.cond``, ``map`` and other ops enclose.

A captured block is a graph of its own. A higher-order op calls it, and receives all that the block reads, parameters
too. The layers are called inside, so the op itself does not say how a parameter is used. :data:`ARGUMENT_LAYOUTS` lists
the ops that are known.

A *subgraph input* says how: an ``aten.alias`` in front of the op, through which the weight or bias of one layer enters
one block and nothing else. Its custom meta describes the layer inside. A subgraph input therefore stands for the
layer's node wherever a pass looks for the node that reads a parameter. ``adapt.expose_subgraph_params`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.module_paths import module_path
from adaptc.passes.graph.ops import LAYER_OPS, SUBGRAPH_INPUT_META, called_op, custom_meta, operands
from adaptc.torch_typing import is_list_or_tuple

#: the name that strict captures give to the root inside a block
_ROOT = "_export_root"


@dataclass(frozen=True)
class ArgumentLayout:
    """The positions of graphs and operands among the arguments of a higher-order op.

    ``bodies`` are the positions of its graphs, and ``operand_lists`` those of its lists of operands, in the order in
    which the bodies read them. ``unchanged_list`` is the position of the list whose values the bodies read unchanged.
    For an op without lists, ``rest`` is the position of the first operand.
    """

    bodies: tuple[int, ...]
    operand_lists: tuple[int, ...] = ()
    unchanged_list: int = 0
    first_operand: int = 0


_OPS = torch.ops.higher_order
#: op -> its layout; other higher-order ops are not known
ARGUMENT_LAYOUTS: dict[Any, ArgumentLayout] = {
    _OPS.wrap_with_set_grad_enabled: ArgumentLayout((1,), first_operand=2),
    _OPS.wrap_with_autocast: ArgumentLayout((4,), first_operand=5),
    _OPS.cond: ArgumentLayout((1, 2), (3,), unchanged_list=3),
    _OPS.map_impl: ArgumentLayout((0,), (1, 2), unchanged_list=2),
    _OPS.while_loop: ArgumentLayout((0, 1), (2, 3), unchanged_list=3),
    _OPS.scan: ArgumentLayout((0,), (1, 2, 3), unchanged_list=3),
}


@dataclass(frozen=True)
class SubgraphInput:
    """The layer behind a subgraph input.

    ``owner`` is the path of the module called inside, None if the capture does not tell. ``rivals`` are FQNs of
    parameters, any of which may be the one meant. ``bias`` names the subgraph input of the layer's bias. It is ""
    for no bias, and None if the block computes what is added. ``op`` is the name and the remaining arguments of the
    layer's op, None if no layer is behind the subgraph input.
    """

    owner: str | None
    kind: str
    op: tuple[str, tuple[Any, ...]] | None = None
    bias: str | None = ""
    rivals: tuple[str, ...] = ()

    def to_meta(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, which ``ops.called`` reads too."""
        op = None if self.op is None else [self.op[0], _as_lists(self.op[1])]
        return {**vars(self), "op": op, "rivals": list(self.rivals)}


def subgraph_input_of(node: fx.Node) -> SubgraphInput | None:
    """Return the layer behind a subgraph input; None for all other nodes."""
    meta: Mapping[str, Any] | None = custom_meta(node).get(SUBGRAPH_INPUT_META)
    if meta is None:
        return None
    target, rest = called_op(node)
    op = None if target is None else (str(target), rest)
    return SubgraphInput(meta["owner"], meta["kind"], op, meta["bias"], tuple(meta["rivals"]))


def takes_bias(node: fx.Node) -> bool:
    """Return whether the op that reads a node's weight can add a bias; the op may be behind a subgraph input."""
    target, _ = called_op(node)
    return target is not None and LAYER_OPS[target][3] is not None


def bias_and_reader(nodes: Mapping[str, fx.Node], node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """Return the bias node at a node with :func:`takes_bias`, None without a bias, and the node that reads it.

    A bias that a block computes inside does not count: :attr:`Inside.bias` is None for it.
    """
    subgraph_input = subgraph_input_of(node)
    if subgraph_input is None:
        return operands(node)[2], node
    if not subgraph_input.bias:
        return None, node
    bias_input = nodes[subgraph_input.bias]
    return bias_input.args[0], bias_input  # type: ignore[return-value]  # an alias reads a node


def subgraph_module_path(node: fx.Node, module_paths: Collection[str]) -> str | None:
    """Return the path of the module in which a node inside a block was traced; None if the capture does not say."""
    if not node.meta.get("nn_module_stack"):
        return None
    path = module_path(node, module_paths)
    head, _, rest = path.partition(".")
    return rest if head == _ROOT and head not in module_paths else path


@dataclass(frozen=True)
class HigherOrderCall:
    """A call of a higher-order op of known layout, in the graph of ``module``."""

    node: fx.Node
    module: fx.GraphModule
    layout: ArgumentLayout

    @classmethod
    def from_node(cls, node: fx.Node, module: fx.GraphModule) -> HigherOrderCall | None:
        """Return the call that a node is; None for other nodes, unknown layouts, and calls with keyword arguments."""
        layout = ARGUMENT_LAYOUTS.get(node.target) if node.op == "call_function" else None
        return None if layout is None or node.kwargs else cls(node, module, layout)

    def bodies(self) -> list[fx.GraphModule]:
        """Return the graph modules that the call runs, in the order of the layout."""
        return [getattr(self.module, str(b.target)) for b in self._body_nodes()]

    def has_no_outputs(self) -> bool:
        """Return whether no value leaves the block: the program did not use its results, but the capture kept it."""
        return not any(b.graph.output_node().args[0] for b in self.bodies())

    def is_empty(self) -> bool:
        """Return whether no value leaves the block and its bodies compute nothing."""
        return self.has_no_outputs() and all(
            n.op in ("placeholder", "output") for b in self.bodies() for n in b.graph.nodes
        )

    def copy_bodies(self, copy: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
        """Give this call bodies made by ``copy``, under names that nothing else in its module uses."""
        for i, node in zip(self.layout.bodies, self._body_nodes(), strict=True):
            name, body = str(node.target), copy(getattr(self.module, str(node.target)))
            others = [n for n in node.graph.find_nodes(op="get_attr") if n.target == name]
            if len(others) > 1 or len(node.users) > 1 or self._body_nodes().count(node) > 1:
                name = next(n for k in range(10**6) if not hasattr(self.module, n := f"{name}_{k}"))
                with node.graph.inserting_before(self.node):
                    twin = node.graph.node_copy(node)
                twin.target = name
                self.node.update_arg(i, twin)
            setattr(self.module, name, body)

    def operands(self) -> Iterator[tuple[int, fx.Node, bool]]:
        """Yield (index among the bodies' operands, node, whether the bodies read it unchanged) for each node given."""
        index = 0
        for position in self.layout.operand_lists or (None,):
            values = self.node.args[self.layout.first_operand :] if position is None else self.node.args[position]
            for value in values:  # type: ignore[union-attr]
                if isinstance(value, fx.Node):
                    yield index, value, position is None or position == self.layout.unchanged_list
                index += 1

    def set_operand(self, index: int, value: fx.Node) -> None:
        """Replace the operand at an index; one past the last is appended, and the bodies do not read it yet."""
        if not self.layout.operand_lists:
            kept = self.node.args[: self.layout.first_operand]
            self.node.args = (*kept, *_with_item(self.node.args[self.layout.first_operand :], index, value))
            return
        for position in self.layout.operand_lists:
            values: Any = self.node.args[position]
            if index < len(values) or (position == self.layout.unchanged_list and index == len(values)):
                self.node.update_arg(position, type(values)(_with_item(values, index, value)))
                return
            index -= len(values)

    def operand_count(self) -> int:
        """Return how many operands the bodies read."""
        if not self.layout.operand_lists:
            return len(self.node.args) - self.layout.first_operand
        return sum(len(self.node.args[p]) for p in self.layout.operand_lists)  # type: ignore[arg-type]

    def _body_nodes(self) -> list[fx.Node]:
        return [self.node.args[i] for i in self.layout.bodies]  # type: ignore[misc]


def find_higher_order_calls(module: fx.GraphModule) -> list[HigherOrderCall]:
    """Return the calls in a module's own graph, without those inside its blocks."""
    return [c for n in module.graph.nodes if (c := HigherOrderCall.from_node(n, module)) is not None]


def _with_item(values: Any, index: int, value: fx.Node) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if is_list_or_tuple(value) else value


def copy_bodies(call: HigherOrderCall) -> None:
    """Give a call, and the calls in its bodies, copies of them, which no other program shares."""
    call.copy_bodies(lambda body: module_with_graph(body, copy_graph(body.graph)))
    for body in call.bodies():
        for node in body.graph.nodes:
            inner = HigherOrderCall.from_node(node, body)
            if inner is not None:
                copy_bodies(inner)


def module_with_graph(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a module of ``graph``, with the tensors and subgraph bodies of ``module``."""
    new = fx.GraphModule(module, graph)
    new.meta.update(module.meta)
    return new
