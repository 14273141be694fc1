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
from adaptc.passes.analysis.attention_cores import SHAPED, Core, Operand, find_cores, none_found
from adaptc.passes.analysis.cache_inputs import cache_inputs
from adaptc.passes.analysis.token_places import Lookup
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.regions import node_tag, region_tag

aten = torch.ops.aten

#: ops between keys and what reads them that only repeat heads
_REPEATS = (*SHAPED, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default)


@dataclass(frozen=True)
class Attentions:
    """The attentions of a lookup's tokens to each other, in order; of a program that takes keys from a cache there are
    none, but as many as it has. All have keys and values of ``heads`` heads of ``width``, which queries may share in
    groups."""

    cores: tuple[Core, ...]
    count: int
    heads: int
    width: int


@dataclass(frozen=True)
class Edge:
    """``reader`` is inside and reads ``node``, which is beside; ``masks``: as a mask or bias of an attention's keys."""

    node: fx.Node
    reader: fx.Node
    masks: bool


def find_attentions(lifted: Lifted, lookup: Lookup, name: str) -> Attentions:
    """Raises TargetError for ``name``, a method, where there are none, or such that are not of one shape."""
    if pairs := cache_inputs(lifted):
        return _cached(pairs, name)
    tokens = inside(lifted, lookup)
    cores, near = find_cores(lifted)
    # What tokens attend to beside each other, as to those of an encoder, has nothing in front.
    found = [c for c in cores if c.node in tokens and c.key.node in tokens]
    near = [n for n in near if n.node in tokens]
    if not found or near:
        what = (
            f"and {'not all' if found else 'no'} attention of the tokens of {lookup.ids.name!r} in the program itself"
        )
        raise TargetError(
            f"{name} puts keys and values in front of those of each attention, {what} is understood: "
            f"{none_found(near)}. Capture the model with attn_implementation='sdpa', if it has it, and with no part of "
            "it inside a block (no_grad, autocast, cond)"
        )
    shapes: dict[tuple[int, int], fx.Node] = {}
    length = str(lookup.ids.meta["val"].shape[1])
    for core in found:
        shape, other = (_upright(c) for c in (core.key, core.value))
        sizes = [str(core.query.node.meta["val"].shape[-2]), *(str(s[-2]) for s in (shape, other))]
        if len(shape) != 4 or sizes != [length] * 3 or str(shape) != str(other):
            raise TargetError(
                f"{name} puts keys and values in front of those of each attention, and {core.node.name!r} has keys of "
                f"shape {_text(shape)} and values of shape {_text(other)}: needed is one shape (batch, heads, "
                f"length, width) for both, of the {length} tokens of {lookup.ids.name!r}"
            )
        shapes.setdefault((int(shape[1]), int(shape[3])), core.node)
    return Attentions(tuple(found), len(found), *_one(shapes, name))


def _upright(operand: Operand) -> tuple[Any, ...]:
    """The shape of keys or values, before each head was repeated for the queries that share it."""
    node, turned = operand.upright()
    shape = tuple(unrepeated(node).meta["val"].shape)
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


def _cached(pairs: Sequence[tuple[fx.Node, fx.Node]], name: str) -> Attentions:
    shapes = {(int(n.meta["val"].shape[1]), int(n.meta["val"].shape[3])): n for pair in pairs for n in pair}
    return Attentions((), len(pairs), *_one(shapes, name))


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


def keys_and_values(attentions: Attentions) -> list[tuple[fx.Node, bool]]:
    """Those of each attention of a program without a cache, in turn: (batch, heads, length, width), and whether the
    last two axes are the other way round."""
    found = [operand.upright() for core in attentions.cores for operand in (core.key, core.value)]
    return [(unrepeated(node), turned) for node, turned in found]


def edges(lifted: Lifted, lookup: Lookup, attentions: Attentions, beside: Collection[fx.Node]) -> Iterator[Edge]:
    """Where what is beside the tokens goes in before, or at, an attention."""
    tokens, before = inside(lifted, lookup), {c.node for c in attentions.cores}
    stack = list(before)
    while stack:
        fresh = set(stack.pop().all_input_nodes) - before
        before |= fresh
        stack += fresh
    readers: dict[fx.Node, list[Core]] = {}
    for core in attentions.cores:
        for node in (core.node, *core.scores):
            readers.setdefault(node, []).append(core)
    for reader in lifted.graph.nodes:
        if reader not in tokens or reader not in before or tokens.isdisjoint(reader.all_input_nodes):
            continue  # what begins with the tokens' own ids reads those
        for node in reader.all_input_nodes:
            if node in beside and node not in tokens and not is_size(node):
                yield Edge(node, reader, any(core.biases(node, reader) for core in readers.get(reader, ())))


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
