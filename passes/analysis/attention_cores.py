"""Attentions in a graph, in any form that is understood, as one description that all forms fill.

PyTorch's op is one form. The other is written out: a product of queries and keys, what is done to these scores (a
scale, a cap, a bias, a mask), a softmax along the keys, and a product of its chances with values. Heads have an axis of
their own, or share the first one with the batch.

Before: an opened program, with adapters in it or not. After: it is unchanged. What looks like an attention and is not
understood is told with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.passes.ir.effects import is_metadata_assert
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import CASTS, TABLE, argument

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
#: positions of its arguments
_QUERY, _KEY, _VALUE, _MASK, _CAUSAL = 0, 1, 2, 3, 5
_SOFTMAX: tuple[Any, ...] = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
#: products of two tensors, and where their factors are
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
_WHERES: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2),
    aten.where.ScalarOther: (1,),
    aten.where.ScalarSelf: (2,),
}
_TURNS: tuple[Any, ...] = (aten.transpose.int, aten.permute.default, aten.mT.default)
#: views whose second argument is a shape
SHAPED: tuple[Any, ...] = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
#: what may leave a tensor as it is
_SAME: tuple[Any, ...] = (*SHAPED, *CASTS, aten.clone.default)
#: what chances go through before they weigh values
_BEHIND: tuple[Any, ...] = (
    *SHAPED,
    *CASTS,
    aten.dropout.default,
    aten.mul.Tensor,
    *_WHERES,
    aten.masked_fill.Scalar,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.type_as.default,
)
#: what adds to scores or hides some
_ADDS: tuple[Any, ...] = (
    *SHAPED,
    *CASTS,
    *_SOFTMAX,
    aten.add.Tensor,
    aten.add_.Tensor,
    *_WHERES,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.type_as.default,
)
#: what is done to scores one by one
_EACH: tuple[Any, ...] = (
    *CASTS,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div_.Tensor,
    aten.div.Scalar,
    aten.tanh.default,
    aten.tanh_.default,
)

#: what an attention written out is, in words
WRITTEN_OUT = "a softmax along the last axis of one product of queries and keys, whose result weighs values"


@dataclass(frozen=True)
class Operand:
    """What ``reader`` reads at position ``at``: (batch, heads, length, width), or with the last two axes ``turned``."""

    reader: fx.Node
    at: int
    turned: bool = False

    @property
    def node(self) -> fx.Node:
        return argument(self.reader, self.at)

    def upright(self) -> tuple[fx.Node, bool]:
        """The node, seen through what turned it; and whether it is turned still."""
        node: Any = self.node
        while self.turned and node.target in _SAME and _shape(node.args[0]) == _shape(node):
            node = node.args[0]
        return (node.args[0], False) if self.turned and _swaps(node) else (self.node, self.turned)


@dataclass(frozen=True)
class Core:
    """``node`` gives what queries find. Of an attention written out ``scores`` are the nodes whose last axis is that of
    the keys, from the product on, and ``views`` those in front of it whose shape says how many keys there are, each
    with the axis of these."""

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    scores: tuple[fx.Node, ...] = ()
    views: tuple[tuple[fx.Node, int], ...] = ()

    @property
    def orders(self) -> bool:
        """Whether it masks by order itself."""
        return self.node.target == SDPA and bool(argument(self.node, _CAUSAL)) and argument(self.node, _MASK) is None

    def biases(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether ``reader`` reads ``node`` as something that all scores have one of, or none: a mask, a bias."""
        if self.node.target == SDPA:
            return reader is self.node and argument(reader, _MASK) is node
        return reader in self.scores and all(argument(o.reader, o.at) is not node for o in self._factors(reader))

    def factor(self) -> float | None:
        """The factor on products, of a product that adds; None for others."""
        adds = self.scores[:1] and self.scores[0].target == aten.baddbmm.default
        return float(argument(self.scores[0], 4)) if adds else None

    def _factors(self, reader: fx.Node) -> tuple[Operand, ...]:
        return tuple(Operand(reader, at) for at in _PRODUCTS.get(reader.target, ()))

    def each(self) -> tuple[list[fx.Node], fx.Node | None]:
        """What it does to each score before it adds anything, in order; and the first op behind that which does more
        than to add or hide, None where there is none. A product that adds does nothing else before."""
        rest, found = list(self.scores[1:]), []
        while self.factor() is None and rest and rest[0].target in _EACH and len(rest[0].all_input_nodes) == 1:
            found.append(rest.pop(0))
        return found, next((n for n in rest if n.target not in _ADDS), None)


@dataclass(frozen=True)
class Near:
    """What looks like an attention written out, with its softmax, and why it is not understood."""

    node: fx.Node
    why: str


def find_cores(lifted: Lifted) -> tuple[list[Core], list[Near]]:
    """The attentions of a program in order, and what is near one."""
    found = [c for n in lifted.graph.nodes if n.op == "call_function" and (c := core_of(lifted, n)) is not None]
    return [c for c in found if isinstance(c, Core)], [c for c in found if isinstance(c, Near)]


def none_found(near: list[Near]) -> str:
    """What was looked for, and the nearest that there is."""
    nearest = f"; nearest is {near[0].node.name!r}: {near[0].why}" if near else ""
    return f"looked for scaled_dot_product_attention, and for {WRITTEN_OUT}{nearest}"


def core_of(lifted: Lifted, node: fx.Node) -> Core | Near | None:
    """The attention that gives ``node``; None where it does not look like one."""
    if node.target == SDPA:
        return Core(node, Operand(node, _QUERY), Operand(node, _KEY), Operand(node, _VALUE))
    if node.target not in _PRODUCTS:
        return None
    chances, values = (argument(node, at) for at in _PRODUCTS[node.target])
    behind = _back_to_softmax(chances)
    if behind is None:
        turned = _back_to_softmax(values, turned=True)
        if turned is None or not _products(lifted, turned[-1]):
            return None
        return Near(turned[-1], f"its chances are the second factor of {node.name!r}")
    softmax = behind[-1]
    products = _products(lifted, softmax)
    if not products:
        return None
    if len(products) > 1:
        names = " and ".join(repr(p.name) for p in products[:2])
        return Near(softmax, f"its scores are made of {len(products)} products, {names} first")
    scores = [*_between(products[0], softmax), *reversed(behind[:-1])]
    try:
        return _written_out(node, products[0], softmax, scores)
    except _NotUnderstood as error:
        return Near(softmax, str(error))


class _NotUnderstood(Exception):
    pass


def _written_out(node: fx.Node, product: fx.Node, softmax: fx.Node, scores: list[fx.Node]) -> Core:
    rank = len(_shape(softmax))
    if argument(softmax, 1) not in (-1, rank - 1):
        raise _NotUnderstood("it is not along the last axis")
    if turned := next((n for n in scores if n.target in _TURNS), None):
        raise _NotUnderstood(f"{turned.name!r} turns its scores")
    keys = _shape(product)[-1]
    if other := next((n for n in (scores[-1], node) if _read_by(n, node, keys)), None):
        raise _NotUnderstood(f"{other.name!r} has not as many chances as there are keys")
    at_query, at_key = _PRODUCTS[product.target]
    query = _with_heads(Operand(product, at_query), alone=False)[0]
    key, own = _with_heads(Operand(product, at_key, turned=True))
    value, others = _with_heads(Operand(node, _PRODUCTS[node.target][1]))
    return Core(node, query, key, value, tuple(scores), (*own, *others))


def _read_by(last: fx.Node, node: fx.Node, keys: str) -> bool:
    return last is not node and _shape(last)[-1:] != [keys]


def _with_heads(operand: Operand, alone: bool = True) -> tuple[Operand, list[tuple[fx.Node, int]]]:
    """The operand where heads have an axis of their own, and the views between; ``alone``: which nothing else reads."""
    turned = operand.turned
    node: Any = operand.node
    views: list[tuple[fx.Node, int]] = []
    if len(_shape(node)) == 4:
        return operand, []
    while True:
        readers = [u for u in node.users if not is_metadata_assert(u)] if isinstance(node, fx.Node) else []
        if not readers or (alone and len(readers) > 1):
            raise _NotUnderstood(f"what {operand.reader.name!r} reads has heads and batches on one axis, or none")
        if _swaps(node):
            turned = not turned
        elif node.target in SHAPED and len(_shape(node.args[0])) == 4 and _shape(node.args[0])[2:] == _shape(node)[1:]:
            return Operand(node, 0, turned), [(node, 2 if turned else 1), *views]
        else:
            raise _NotUnderstood(f"{node.name!r} has no axis of heads, nor is it a view of what has one")
        node = node.args[0]


def _back_to_softmax(node: Any, turned: bool = False) -> list[fx.Node] | None:
    """From what weighs values back to its softmax."""
    path: list[fx.Node] = []
    allowed = (*_BEHIND, *_TURNS) if turned else _BEHIND
    while isinstance(node, fx.Node) and node.op == "call_function":
        path.append(node)
        if node.target in _SOFTMAX:
            return path
        if node.target not in allowed:
            return None
        read = [argument(node, at) for at in _WHERES.get(node.target, (0,))]
        node = max(read, key=lambda n: len(_shape(n)))
    return None


def _products(lifted: Lifted, softmax: fx.Node) -> list[fx.Node]:
    """The products of two activations that the scores of a softmax are made of."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack: list[Any] = [softmax.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or not _is_tensor(node) or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            if not any(_is_weight(lifted, argument(node, at)) for at in _PRODUCTS[node.target]):
                found.append(node)
            if node.target == aten.baddbmm.default:
                stack.append(argument(node, 0))
        elif node.target not in TABLE and node.target != SDPA and node.target not in _SOFTMAX:
            stack += node.all_input_nodes
    return found


def _is_weight(lifted: Lifted, node: Any) -> bool:
    while isinstance(node, fx.Node) and (node.target in CASTS or node.target in _TURNS or node.target in SHAPED):
        node = node.args[0]
    fixed = isinstance(node, fx.Node) and node.op == "placeholder"
    return fixed and lifted.specs[node.name].kind != InputKind.USER_INPUT


def _between(product: fx.Node, softmax: fx.Node) -> Iterator[fx.Node]:
    """The nodes from a product to a softmax, both too."""
    before, stack = {softmax}, [softmax]
    while stack:
        fresh = {n for n in stack.pop().all_input_nodes if n not in before and _is_tensor(n)} - {product}
        before |= fresh
        stack += [n for n in fresh if n.target not in TABLE]
    there = {product}
    for node in product.graph.nodes:
        if node is product or (node in before and not there.isdisjoint(node.all_input_nodes)):
            there.add(node)
            yield node
        if node is softmax:
            return


def _swaps(node: Any) -> bool:
    """Whether it turns the last two axes."""
    if not isinstance(node, fx.Node) or node.target not in _TURNS:
        return False
    rank = len(_shape(node))
    if node.target == aten.permute.default:
        return [d % rank for d in argument(node, 1)] == [*range(rank - 2), rank - 1, rank - 2]
    return node.target == aten.mT.default or {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def _shape(node: Any) -> list[str]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [str(s) for s in value.shape] if isinstance(value, Tensor) else []
