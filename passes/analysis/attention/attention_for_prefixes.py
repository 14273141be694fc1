"""Find where a program's tokens attend to each other, and the masks and positions that these attentions depend on.

Nodes computed from the token embedding are *activations*. Other nodes computed from a caller's inputs or their sizes
are *side nodes*: position_ids and what is made of them, masks, token_type_ids. Under a KV prefix the activations keep
their sizes. The side nodes change as they would for that many more tokens.

Takes an opened program and does not change it. Errors name what was looked for and what is there instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.errors import TargetError
from adaptc.passes.analysis.attention.attention_patterns import (
    SHAPE_VIEWS,
    AttentionCore,
    AttentionOperand,
    describe_search,
    find_attention_cores,
)
from adaptc.passes.analysis.cache_inputs import find_kv_inputs
from adaptc.passes.analysis.tokens.token_inputs import Lookup
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.regions import node_tag, region_tag
from adaptc.torch_typing import symbolic_expression

aten = torch.ops.aten

#: ops between keys and their reader that only repeat heads (grouped-query attention)
_HEAD_REPEATS = (*SHAPE_VIEWS, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default)


@dataclass(frozen=True)
class SelfAttentions:
    """The attentions of a lookup's tokens to each other, in graph order.

    All have keys and values of ``heads`` heads of ``head_dim``, which groups of queries may share. In a program that
    takes a cache, ``cores`` is empty and ``count`` is the number of layers in the cache.
    """

    cores: tuple[AttentionCore, ...]
    count: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class SideRead:
    """A read of ``node``, a side node, by ``reader``, an activation.

    ``is_mask`` says that the reader is an attention that takes it as a mask or bias over its keys.
    """

    node: fx.Node
    reader: fx.Node
    is_mask: bool


def find_self_attentions(lifted: LiftedProgram, lookup: Lookup, name: str) -> SelfAttentions:
    """Return the attentions of the tokens that ``lookup`` looks up; ``name`` is the method, for errors.

    Raises TargetError where there are none, where one is not understood, or where their keys differ in shape.
    """
    if pairs := find_kv_inputs(lifted):
        return _cache_attentions(pairs, name)
    activations = find_activations(lifted, lookup)
    cores, near = find_attention_cores(lifted)
    # Cross-attention to an encoder's states gets no KV prefix.
    found = [c for c in cores if c.node in activations and c.key.node in activations]
    near = [n for n in near if n.node in activations]
    if not found or near:
        what = (
            f"and {'not all' if found else 'no'} attention of the tokens of {lookup.ids.name!r} in the program itself"
        )
        raise TargetError(
            f"{name} puts keys and values in front of those of each attention, {what} is understood: "
            f"{describe_search(near)}. Capture the model with attn_implementation='sdpa', if it has it, and with no "
            "part of it inside a block (no_grad, autocast, cond)"
        )
    shapes: dict[tuple[int, int], fx.Node] = {}
    length = str(lookup.ids.meta["val"].shape[1])
    for core in found:
        shape, other = (_kv_shape(c) for c in (core.key, core.value))
        sizes = [str(core.query.node.meta["val"].shape[-2]), *(str(s[-2]) for s in (shape, other))]
        if len(shape) != 4 or sizes != [length] * 3 or str(shape) != str(other):
            raise TargetError(
                f"{name} puts keys and values in front of those of each attention, and {core.node.name!r} has keys of "
                f"shape {_shape_text(shape)} and values of shape {_shape_text(other)}: needed is one shape (batch, "
                f"heads, length, width) for both, of the {length} tokens of {lookup.ids.name!r}"
            )
        shapes.setdefault((int(shape[1]), int(shape[3])), core.node)
    return SelfAttentions(tuple(found), len(found), *_common_shape(shapes, name))


def _kv_shape(operand: AttentionOperand) -> tuple[Any, ...]:
    """Return the shape (batch, heads, length, width) of keys or values before heads are repeated for their queries."""
    node, turned = operand.before_transpose()
    shape = tuple(before_head_repeat(node).meta["val"].shape)
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


def _cache_attentions(pairs: Sequence[tuple[fx.Node, fx.Node]], name: str) -> SelfAttentions:
    shapes = {(int(n.meta["val"].shape[1]), int(n.meta["val"].shape[3])): n for pair in pairs for n in pair}
    return SelfAttentions((), len(pairs), *_common_shape(shapes, name))


def _common_shape(shapes: Mapping[tuple[int, int], fx.Node], name: str) -> tuple[int, int]:
    """Return the (heads, width) that all attentions have. Raises TargetError where they differ."""
    if len(shapes) > 1:
        (one, a), (other, b) = list(shapes.items())[:2]
        raise TargetError(
            f"{name} has as many heads of one width for every attention, and {a.name!r} has {one[0]} of {one[1]}, "
            f"{b.name!r} {other[0]} of {other[1]}: programs whose layers differ are not supported"
        )
    return next(iter(shapes))


def find_activations(lifted: LiftedProgram, lookup: Lookup) -> set[fx.Node]:
    """Return the nodes computed from a lookup or from the adapters at it. Sizes are never among them."""
    adapter_sites = {t["site"] for n in lifted.graph.nodes if (t := region_tag(n)) and t["node"] == lookup.node.name}
    out: set[fx.Node] = set()
    for node in lifted.graph.nodes:
        tag = node_tag(node)
        first = node is lookup.node or (tag is not None and tag["site"] in adapter_sites)
        if node.op == "call_function" and not is_size(node) and (first or not out.isdisjoint(node.all_input_nodes)):
            out.add(node)
    return out


def keys_and_values(attentions: SelfAttentions) -> list[tuple[fx.Node, bool]]:
    """Return the keys and the values of each attention in turn, for a program without a cache.

    Each is a node of shape (batch, heads, length, width), and whether its last two axes are swapped.
    """
    found = [operand.before_transpose() for core in attentions.cores for operand in (core.key, core.value)]
    return [(before_head_repeat(node), turned) for node, turned in found]


def find_side_reads(
    lifted: LiftedProgram, lookup: Lookup, attentions: SelfAttentions, side_nodes: Collection[fx.Node]
) -> Iterator[SideRead]:
    """Yield each read of a node in ``side_nodes`` by an activation, at an attention or at what an attention depends
    on."""
    activations, ancestors = find_activations(lifted, lookup), {c.node for c in attentions.cores}
    stack = list(ancestors)
    while stack:
        fresh = set(stack.pop().all_input_nodes) - ancestors
        ancestors |= fresh
        stack += fresh
    readers: dict[fx.Node, list[AttentionCore]] = {}
    for core in attentions.cores:
        for node in (core.node, *core.scores):
            readers.setdefault(node, []).append(core)
    for reader in lifted.graph.nodes:
        if reader not in activations or reader not in ancestors or activations.isdisjoint(reader.all_input_nodes):
            continue  # the lookup itself reads the token ids, which stay as they are
        for node in reader.all_input_nodes:
            if node in side_nodes and node not in activations and not is_size(node):
                yield SideRead(node, reader, any(core.reads_as_bias(node, reader) for core in readers.get(reader, ())))


def find_length_dependent(lifted: LiftedProgram, lookup: Lookup) -> set[fx.Node]:
    """Return the side nodes whose values would differ for more tokens.

    These are the inputs, the nodes computed from them, and sizes that depend on the length of the tokens alone. A size
    that depends on more (batch * length) counts values of activations, and is left out.
    """
    size = lookup.ids.meta["val"].shape[1].node.expr
    activations = find_activations(lifted, lookup)
    out = {lifted.nodes[n] for n, s in lifted.input_specs.items() if s.kind == InputKind.USER_INPUT}
    for node in lifted.graph.nodes:
        if node.op != "call_function" or node in activations:
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            follows = symbolic_expression(value).free_symbols == {size}
        else:
            follows = not out.isdisjoint(node.all_input_nodes)
        if follows:
            out.add(node)
    return out


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def before_head_repeat(node: Any) -> fx.Node:
    """Return the node of keys or values before each head was repeated for the queries that share it."""
    found = node
    while isinstance(node, fx.Node) and node.target in _HEAD_REPEATS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim == 4 and _equal_but_heads(value, found.meta["val"]):
            found = node
    return found


def _equal_but_heads(value: Tensor, other: Tensor) -> bool:
    """Return whether the sizes of all axes but the heads' (1) are equal, compared as text."""
    return [str(s) for i, s in enumerate(value.shape) if i != 1] == [
        str(s) for i, s in enumerate(other.shape) if i != 1
    ]


def _shape_text(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"
