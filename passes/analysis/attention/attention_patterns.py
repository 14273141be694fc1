"""Find the attention computations of a graph, and describe every form of them by one class, :class:`Core`.

PyTorch's ``scaled_dot_product_attention`` is one form. The other is written out. It begins with a matmul of queries and
keys, and ops on these scores (a scale, a cap, a bias, a mask). A softmax along the keys follows, and a matmul of the
attention weights with the values. Heads have an axis of their own, or share the first axis with the batch.

Takes an opened program, with adapters in it or not, and does not change it. What looks like an attention and is not
understood is returned as a :class:`NearAttention` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.mutation import is_metadata_assert
from adaptc.passes.graph.ops import CASTS, TABLE, argument

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
#: positions of the arguments of SDPA
_QUERY, _KEY, _VALUE, _MASK, _CAUSAL = 0, 1, 2, 3, 5
_SOFTMAX: tuple[Any, ...] = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
#: matmul op -> the positions of its two factors
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
#: ops that may leave a tensor as it is
_SAME: tuple[Any, ...] = (*SHAPED, *CASTS, aten.clone.default)
#: ops that attention weights may go through between the softmax and the matmul with the values
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
#: ops that add to scores or mask some, and ops that may stand among these without changing a score otherwise
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
#: ops that change each score by itself: a scale, a cap, a cast
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

#: the description of an attention written out, for error messages
WRITTEN_OUT = "a softmax along the last axis of one product of queries and keys, whose result weighs values"


@dataclass(frozen=True)
class Operand:
    """The queries, keys or values of an attention: argument number ``at`` of the node ``reader``.

    Its shape is (batch, heads, length, width). Where ``turned`` is set, the last two axes are swapped.
    """

    reader: fx.Node
    at: int
    turned: bool = False

    @property
    def node(self) -> fx.Node:
        return argument(self.reader, self.at)

    def upright(self) -> tuple[fx.Node, bool]:
        """Return the node before its last two axes were swapped, and whether the returned node still has them swapped.

        Where no swap is found, these are ``node`` and ``turned``.
        """
        node: Any = self.node
        while self.turned and node.target in _SAME and _shape(node.args[0]) == _shape(node):
            node = node.args[0]
        return (node.args[0], False) if self.turned and _swaps(node) else (self.node, self.turned)


@dataclass(frozen=True)
class Core:
    """An attention, in either form; ``node`` computes its output.

    ``scores`` and ``views`` are empty for SDPA. Of an attention written out, ``scores`` are the nodes whose last axis
    is that of the keys, from the matmul of queries and keys on. ``views`` are the views of keys and of values whose
    shape argument contains the number of keys, each as (node, axis of the keys).
    """

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    scores: tuple[fx.Node, ...] = ()
    views: tuple[tuple[fx.Node, int], ...] = ()

    @property
    def orders(self) -> bool:
        """Return whether the op applies a causal mask itself: SDPA with ``is_causal`` and without ``attn_mask``."""
        return self.node.target == SDPA and bool(argument(self.node, _CAUSAL)) and argument(self.node, _MASK) is None

    def biases(self, node: fx.Node, reader: fx.Node) -> bool:
        """Return whether ``reader`` reads ``node`` as a mask or bias of the scores, not as queries, keys or values."""
        if self.node.target == SDPA:
            return reader is self.node and argument(reader, _MASK) is node
        return reader in self.scores and all(argument(o.reader, o.at) is not node for o in self._factors(reader))

    def factor(self) -> float | None:
        """Return ``alpha``, by which ``baddbmm`` scales its matmul; None where another op computes the scores."""
        adds = self.scores[:1] and self.scores[0].target == aten.baddbmm.default
        return float(argument(self.scores[0], 4)) if adds else None

    def _factors(self, reader: fx.Node) -> tuple[Operand, ...]:
        return tuple(Operand(reader, at) for at in _PRODUCTS.get(reader.target, ()))

    def each(self) -> tuple[list[fx.Node], fx.Node | None]:
        """Return the ops that scale or cap each score before a mask or bias is added, in order, and an unknown op.

        The unknown op is the first later one that does more to scores than add, mask or normalise them. It is None
        where there is none. ``baddbmm`` adds within the matmul, so for it the list is empty.
        """
        rest, found = list(self.scores[1:]), []
        while self.factor() is None and rest and rest[0].target in _EACH and len(rest[0].all_input_nodes) == 1:
            found.append(rest.pop(0))
        return found, next((n for n in rest if n.target not in _ADDS), None)


@dataclass(frozen=True)
class NearAttention:
    """A softmax ``node`` that looks like that of an attention written out, and ``why`` it is not understood."""

    node: fx.Node
    why: str


def find_cores(lifted: Lifted) -> tuple[list[Core], list[NearAttention]]:
    """Return the attentions of a program in graph order, and the softmaxes that only look like one of an attention."""
    found = [c for n in lifted.graph.nodes if n.op == "call_function" and (c := core_of(lifted, n)) is not None]
    return [c for c in found if isinstance(c, Core)], [c for c in found if isinstance(c, NearAttention)]


def none_found(near: list[NearAttention]) -> str:
    """Return the part of an error message that says what was looked for, and names the first entry of ``near``."""
    nearest = f"; nearest is {near[0].node.name!r}: {near[0].why}" if near else ""
    return f"looked for scaled_dot_product_attention, and for {WRITTEN_OUT}{nearest}"


def core_of(lifted: Lifted, node: fx.Node) -> Core | NearAttention | None:
    """Return the attention whose output is ``node``.

    Gives a :class:`NearAttention` where the node looks like an attention and is not understood. Gives None where it
    does not look like one.
    """
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
        return NearAttention(turned[-1], f"its chances are the second factor of {node.name!r}")
    softmax = behind[-1]
    products = _products(lifted, softmax)
    if not products:
        return None
    if len(products) > 1:
        names = " and ".join(repr(p.name) for p in products[:2])
        return NearAttention(softmax, f"its scores are made of {len(products)} products, {names} first")
    scores = [*_between(products[0], softmax), *reversed(behind[:-1])]
    try:
        return _written_out(node, products[0], softmax, scores)
    except _NotUnderstood as error:
        return NearAttention(softmax, str(error))


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
    """Return the operand at the node where heads have an axis of their own, and the view that joins heads and batch.

    The view comes as a list of (node, axis of the keys), empty where the operand has four axes already. ``alone``
    refuses an operand with a second reader on the way. Raises _NotUnderstood where no such node is found.
    """
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
    """Return the nodes from the attention weights ``node`` back to their softmax, which is last.

    Gives None where there is no softmax. ``turned`` also passes through transposes.
    """
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
    """Return the matmuls of two activations that the input of ``softmax`` is computed from."""
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
    """Yield the nodes on the way from ``product`` to ``softmax`` in graph order, both included."""
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
    """Return whether ``node`` swaps the last two axes of its input."""
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
