"""Where a program's tokens attend to each other, and what it computes beside them that attention depends on.

What follows from the lookup of the tokens is *inside*. All else that follows from a caller's inputs or their sizes is
*beside*: positions and what is made of them, masks, token types. Where keys are put in front of those of the tokens,
the tokens stay what they are and what is beside them changes, as it would if there were as many more of them.

Before: an opened program. After: it is unchanged. Errors name what was looked for and what is there instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.errors import TargetError
from adaptc.passes.analysis.cache_inputs import cache_inputs
from adaptc.passes.analysis.token_places import Lookup
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.regions import node_tag, region_tag

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
#: positions of its arguments
QUERY, KEY, VALUE, MASK, CAUSAL = 0, 1, 2, 3, 5
#: ops between keys and what reads them that only repeat heads
_REPEATS = (aten.reshape.default, aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Attentions:
    """The attentions of a lookup's tokens to each other, in order, or the inputs with their keys where a program takes
    those from a cache. All have keys and values of ``heads`` heads of ``width``, which queries may share in groups."""

    nodes: tuple[fx.Node, ...]
    heads: int
    width: int


@dataclass(frozen=True)
class Edge:
    """``reader`` is inside and reads ``node``, which is beside; ``masks``: as the mask of an attention."""

    node: fx.Node
    reader: fx.Node
    masks: bool


def find_attentions(lifted: Lifted, lookup: Lookup, name: str) -> Attentions:
    """Raises TargetError for ``name``, a method, where there are none, or such that are not of one shape."""
    if pairs := cache_inputs(lifted):
        return _cached(pairs, name)
    tokens = inside(lifted, lookup)
    found = [n for n in lifted.graph.find_nodes(op="call_function", target=_ATTENTION) if n in tokens]
    if not found:
        raise TargetError(
            f"{name} puts keys and values in front of those of each attention, and no scaled_dot_product_attention of "
            f"the tokens of {lookup.ids.name!r} was found in the program itself. Capture the model with "
            "attn_implementation='sdpa', if it has it, and with no part of it inside a block (no_grad, autocast, cond)"
        )
    shapes: dict[tuple[int, int], fx.Node] = {}
    for node in found:
        key, value = argument(node, KEY), argument(node, VALUE)
        shape, other = (unrepeated(n).meta["val"].shape for n in (key, value))
        length = str(lookup.ids.meta["val"].shape[1])
        sizes = [str(n.meta["val"].shape[-2]) for n in (argument(node, QUERY), key, value)]
        if len(shape) != 4 or sizes != [length] * 3 or str(shape) != str(other):
            raise TargetError(
                f"{name} puts keys and values in front of those of each attention, and {node.name!r} has keys of shape "
                f"{_text(shape)} and values of shape {_text(other)}: needed is one shape (batch, heads, "
                f"length, width) for both, of the {length} tokens of {lookup.ids.name!r}"
            )
        shapes.setdefault((int(shape[1]), int(shape[3])), node)
    return Attentions(tuple(found), *_one(shapes, name))


def _cached(pairs: Sequence[tuple[fx.Node, fx.Node]], name: str) -> Attentions:
    shapes = {(int(n.meta["val"].shape[1]), int(n.meta["val"].shape[3])): n for pair in pairs for n in pair}
    return Attentions(tuple(keys for keys, _ in pairs), *_one(shapes, name))


def _one(shapes: Mapping[tuple[int, int], fx.Node], name: str) -> tuple[int, int]:
    """The heads and the width that all have."""
    if len(shapes) > 1:
        (one, a), (other, b) = list(shapes.items())[:2]
        raise TargetError(
            f"{name} has as many heads of one width for every attention, and {a.name!r} has {one[0]} of {one[1]}, "
            f"{b.name!r} {other[0]} of {other[1]}: programs whose layers differ are not supported"
        )
    return next(iter(shapes))


def inside(lifted: Lifted, lookup: Lookup) -> set[fx.Node]:
    """What follows from a lookup and the adapters at it. Sizes follow from nothing but other sizes."""
    at_it = {t["site"] for n in lifted.graph.nodes if (t := region_tag(n)) and t["node"] == lookup.node.name}
    out: set[fx.Node] = set()
    for node in lifted.graph.nodes:
        tag = node_tag(node)
        first = node is lookup.node or (tag is not None and tag["site"] in at_it)
        if node.op == "call_function" and not is_size(node) and (first or not out.isdisjoint(node.all_input_nodes)):
            out.add(node)
    return out


def keys_and_values(attentions: Attentions) -> list[fx.Node]:
    """Those of each attention of a program without a cache, in turn: (batch, heads, length, width)."""
    return [unrepeated(argument(node, at)) for node in attentions.nodes for at in (KEY, VALUE)]


def edges(lifted: Lifted, lookup: Lookup, attentions: Attentions, beside: Collection[fx.Node]) -> Iterator[Edge]:
    """Where what is beside the tokens goes in before, or at, an attention."""
    tokens, before = inside(lifted, lookup), set(attentions.nodes)
    stack = list(before)
    while stack:
        fresh = set(stack.pop().all_input_nodes) - before
        before |= fresh
        stack += fresh
    for reader in lifted.graph.nodes:
        if reader not in tokens or reader not in before or tokens.isdisjoint(reader.all_input_nodes):
            continue  # what begins with the tokens' own ids reads those
        for node in reader.all_input_nodes:
            if node in beside and node not in tokens and not is_size(node):
                mask = argument(reader, MASK) if reader.target == _ATTENTION else None
                yield Edge(node, reader, mask is node)


def changing(lifted: Lifted, lookup: Lookup) -> set[fx.Node]:
    """What is beside the tokens and another where there are more of them: all that follows from inputs' values, or from
    how long a sequence is. Sizes of other things besides (of a whole batch) count what is inside."""
    size = lookup.ids.meta["val"].shape[1].node.expr
    tokens = inside(lifted, lookup)
    out = {lifted.nodes[n] for n, s in lifted.specs.items() if s.kind == InputKind.USER_INPUT}
    for node in lifted.graph.nodes:
        if node.op != "call_function" or node in tokens:
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            follows = value.node.expr.free_symbols == {size}
        else:
            follows = not out.isdisjoint(node.all_input_nodes)
        if follows:
            out.add(node)
    return out


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_causal(node: fx.Node) -> bool:
    """Whether an attention masks by order itself."""
    return bool(argument(node, CAUSAL))


def unrepeated(node: Any) -> fx.Node:
    """Keys or values before each head was repeated for the queries that share it."""
    found = node
    while isinstance(node, fx.Node) and node.target in _REPEATS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim == 4 and _like(value, found.meta["val"]):
            found = node
    return found


def _like(value: Tensor, other: Tensor) -> bool:
    """Whether all axes but that of heads are equal, in all that can be told."""
    return [str(s) for i, s in enumerate(value.shape) if i != 1] == [
        str(s) for i, s in enumerate(other.shape) if i != 1
    ]


def _text(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"
