"""Find the effects of a node in an exported graph: randomness, writes, and memory it shares.

Op schemas tell most of it. Some are silent: an op may return its input in some cases, and batch norm writes its running
statistics in training. The tables below cover these. An unknown op counts as having every effect.

Private torch use, with the public route that was tried: ``OpOverload`` and ``HigherOrderOperator`` of ``torch._ops``
tell the ops of a graph from Python functions. Public: none; ``torch.ops`` has the ops and not their classes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from adaptc.passes.graph.ops import argument, schema_of
from adaptc.passes.graph.train_eval import MODE_FLAGS, SDPA, STATISTICS_ARGUMENTS, training_mode_of
from adaptc.torch_typing import is_list_or_tuple, shape_of

aten = torch.ops.aten

#: ops that may return an input or a view of it, although neither their schema nor a tag says so
_MAY_ALIAS = {
    aten.type_as,
    aten.broadcast_tensors,
    aten.meshgrid,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
    aten.sum_to_size,
    aten.to_dense,
    aten.chalf,
    aten.float_power,
    aten.pad,
    aten.cartesian_prod,
}
#: beginnings of the names of ops whose results hold whatever was in memory
_UNINITIALIZED = ("empty", "new_empty", "resize")
#: namespaces whose schemas can be trusted to name what an op writes to and whether it draws random numbers
_TRUSTED_NAMESPACES = ("aten", "prims", "adaptc")


def has_static_sizes(node: fx.Node) -> bool:
    """Return whether the value is a tensor, or a tuple of tensors, whose sizes are all ints."""
    value = node.meta.get("val")
    parts = value if is_list_or_tuple(value) else [value]
    return bool(parts) and all(isinstance(v, Tensor) and all(isinstance(s, int) for s in shape_of(v)) for v in parts)


def is_pure(node: fx.Node) -> bool:
    """Return whether the value follows from the arguments alone and the node has no other effect."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem or target is aten.detach_.default:
        return True
    if (
        not isinstance(target, OpOverload)
        or target.namespace not in _TRUSTED_NAMESPACES
        or schema_of(target).is_mutable
    ):
        return False
    if target in MODE_FLAGS or target is SDPA:
        return not training_mode_of(node)
    if not schema_of(target).returns and not is_metadata_assert(node):
        return False  # an op without results is an assertion, and failing is its effect
    name = target.overloadpacket.__name__
    return torch.Tag.nondeterministic_seeded not in target.tags and not name.startswith(_UNINITIALIZED)


def has_effect(node: fx.Node) -> bool:
    """Return whether a node calls an op of torch that is not pure. Functions on sizes are no ops."""
    return isinstance(node.target, OpOverload) and not is_pure(node)


def is_metadata_assert(node: fx.Node) -> bool:
    """Return whether the node has no value and only checks metadata, as ``torch.export`` does before casts."""
    return node.target is aten._assert_tensor_metadata.default


def written_inputs(node: fx.Node) -> Iterable[fx.Node]:
    """Return the arguments whose memory the node may write to."""
    target = node.target
    if node.op != "call_function" or target is aten.detach_.default:
        return ()
    if isinstance(target, HigherOrderOperator):
        bodies = _subgraph_modules(node)
        harmless = bodies and all(not _graph_writes(body) for body in bodies)
        return () if harmless else node.all_input_nodes
    if not isinstance(target, OpOverload):
        return ()
    found = [argument(node, i) for i in STATISTICS_ARGUMENTS.get(node.target, ()) if training_mode_of(node)]
    for i, a in enumerate(schema_of(target).arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            found.append(argument(node, i))
    return _argument_nodes(found)


def has_mutable_schema(node: fx.Node) -> bool:
    """Return whether the schema of the node's op says that it writes to an argument."""
    target = node.target
    return isinstance(target, OpOverload) and schema_of(target).is_mutable


def aliased_inputs(node: fx.Node) -> Iterable[fx.Node]:
    """Return the arguments whose memory the value may share."""
    target = node.target
    if node.op != "call_function":
        return ()
    if isinstance(target, OpOverload):
        if any(r.alias_info is not None for r in schema_of(target).returns):
            arguments = enumerate(schema_of(target).arguments)
            return _argument_nodes(argument(node, i) for i, a in arguments if a.alias_info is not None)
        if target is aten.einsum.default:  # with one operand it may only transpose, and then returns a view
            operands = _argument_nodes([argument(node, 1)])
            return operands if len(operands) == 1 else ()
        tagged = torch.Tag.maybe_aliasing_or_mutating in target.tags and target not in STATISTICS_ARGUMENTS
        return node.all_input_nodes if tagged or target.overloadpacket in _MAY_ALIAS else ()
    return node.all_input_nodes


def has_view_schema(target: Any) -> bool:
    """Return whether an op's schema says that its results share memory with its arguments, which it does not write to.

    The schemas of casts say so too, although casts mostly copy: see :func:`is_view`.
    """
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def is_view(node: fx.Node) -> bool:
    """Return whether the value certainly is a view of its first argument, judged by dtypes, devices and strides."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node.args[0] not in aliased_inputs(node):
        return False
    old, new = (n.meta.get("val") for n in (node.args[0], node))
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return isinstance(old, (tuple, list)) or isinstance(new, (tuple, list))
    if (old.dtype, old.device) != (new.dtype, new.device) or _forces_copy(node):
        return False
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is aten.contiguous:
        return old.stride() == new.stride()
    if packet in (aten.reshape, aten.flatten):
        return old.is_contiguous()
    return packet is None or any(r.alias_info for r in schema_of(target).returns)


def find_written_nodes(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return (the nodes whose memory is written to; these and the nodes whose memory is returned)."""
    memory = memory_groups(graph)
    written_to = {memory[n] for node in graph.nodes for n in written_inputs(node)}
    returned = {memory[n] for n in graph.output_node().all_input_nodes}
    dirty = {n for n in graph.nodes if memory[n] in written_to}
    return dirty, dirty | {n for n in graph.nodes if memory[n] in returned}


def writers_by_node(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node whose memory may be written to, the nodes that may write to it, in order."""
    memory = memory_groups(graph)
    by_group: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for group in dict.fromkeys(memory[n] for n in written_inputs(node)):
            by_group.setdefault(group, []).append(node)
    return {n: by_group[memory[n]] for n in graph.nodes if memory[n] in by_group}


def memory_groups(graph: fx.Graph, non_aliasing: Collection[Any] = ()) -> UnionFind[fx.Node]:
    """Return the nodes of a graph in groups that may share memory.

    ``non_aliasing`` are Python functions among the targets whose results never share memory with their arguments.
    """
    groups = UnionFind(graph.nodes)
    for node in graph.nodes:
        groups.union(node, *(() if node.target in non_aliasing else aliased_inputs(node)))
    return groups


def erase_dead_nodes(graph: fx.Graph) -> None:
    """Erase the nodes that are pure and have no users, except assertions."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and is_pure(node) and not is_metadata_assert(node):
            graph.erase_node(node)


def _forces_copy(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    names = [] if schema is None else [a.name for a in schema.arguments]
    return "copy" in names and bool(argument(node, names.index("copy")))


def _argument_nodes(arguments: Iterable[Any]) -> list[fx.Node]:
    out: list[fx.Node] = []
    fx.map_arg(list(arguments), out.append)
    return out


def _subgraph_modules(node: fx.Node) -> list[fx.GraphModule]:
    owner = node.graph.owning_module
    named = [n for n in node.all_input_nodes if n.op == "get_attr"]
    found = [getattr(owner, str(n.target), None) for n in named]
    return [m for m in found if isinstance(m, fx.GraphModule)] if all(f is not None for f in found) else []


def _graph_writes(body: fx.GraphModule) -> bool:
    return any(list(written_inputs(n)) for n in body.graph.nodes)
