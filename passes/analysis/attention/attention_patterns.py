"""Find the attention computations of a graph, and describe every form of them by one class, :class:`AttentionCore`.

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

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import is_metadata_assert
from adaptc.passes.graph.ops import CASTS, LAYER_OPS, argument

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
#: positions of the arguments of SDPA
_QUERY, _KEY, _VALUE, _MASK, _CAUSAL = 0, 1, 2, 3, 5
_SOFTMAX: tuple[Any, ...] = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
#: matmul op -> the positions of its two factors
_MATMUL_FACTORS: dict[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
_WHERE_BRANCHES: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2),
    aten.where.ScalarOther: (1,),
    aten.where.ScalarSelf: (2,),
}
_TRANSPOSES: tuple[Any, ...] = (aten.transpose.int, aten.permute.default, aten.mT.default)
#: views whose second argument is a shape
SHAPE_VIEWS: tuple[Any, ...] = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
#: ops that may leave a tensor as it is
_IDENTITY_OPS: tuple[Any, ...] = (*SHAPE_VIEWS, *CASTS, aten.clone.default)
#: ops that attention weights may go through between the softmax and the matmul with the values
_AFTER_SOFTMAX: tuple[Any, ...] = (
    *SHAPE_VIEWS,
    *CASTS,
    aten.dropout.default,
    aten.mul.Tensor,
    *_WHERE_BRANCHES,
    aten.masked_fill.Scalar,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.type_as.default,
)
#: ops that add to scores or mask some, and ops that may stand among these without changing a score otherwise
_SCORE_ADDITIONS: tuple[Any, ...] = (
    *SHAPE_VIEWS,
    *CASTS,
    *_SOFTMAX,
    aten.add.Tensor,
    aten.add_.Tensor,
    *_WHERE_BRANCHES,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.type_as.default,
)
#: ops that change each score by itself: a scale, a cap, a cast
_SCORE_SCALINGS: tuple[Any, ...] = (
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
EAGER_ATTENTION = "a softmax along the last axis of one product of queries and keys, whose result weighs values"


@dataclass(frozen=True)
class AttentionOperand:
    """The queries, keys or values of an attention: argument number ``at`` of the node ``reader``.

    Its shape is (batch, heads, length, width). Where ``turned`` is set, the last two axes are swapped.
    """

    reader: fx.Node
    position: int
    is_transposed: bool = False

    @property
    def node(self) -> fx.Node:
        return argument(self.reader, self.position)

    def before_transpose(self) -> tuple[fx.Node, bool]:
        """Return the node before its last two axes were swapped, and whether the returned node still has them swapped.

        Where no swap is found, these are ``node`` and ``turned``.
        """
        node: Any = self.node
        while self.is_transposed and node.target in _IDENTITY_OPS and _shape(node.args[0]) == _shape(node):
            node = node.args[0]
        return (
            (node.args[0], False) if self.is_transposed and _swaps_last_axes(node) else (self.node, self.is_transposed)
        )


@dataclass(frozen=True)
class AttentionCore:
    """An attention, in either form; ``node`` computes its output.

    ``scores`` and ``views`` are empty for SDPA. Of an attention written out, ``scores`` are the nodes whose last axis
    is that of the keys, from the matmul of queries and keys on. ``views`` are the views of keys and of values whose
    shape argument contains the number of keys, each as (node, axis of the keys).
    """

    node: fx.Node
    query: AttentionOperand
    key: AttentionOperand
    value: AttentionOperand
    scores: tuple[fx.Node, ...] = ()
    length_views: tuple[tuple[fx.Node, int], ...] = ()

    @property
    def is_causal(self) -> bool:
        """Return whether the op applies a causal mask itself: SDPA with ``is_causal`` and without ``attn_mask``."""
        return self.node.target == SDPA and bool(argument(self.node, _CAUSAL)) and argument(self.node, _MASK) is None

    def reads_as_bias(self, node: fx.Node, reader: fx.Node) -> bool:
        """Return whether ``reader`` reads ``node`` as a mask or bias of the scores, not as queries, keys or values."""
        if self.node.target == SDPA:
            return reader is self.node and argument(reader, _MASK) is node
        return reader in self.scores and all(
            argument(o.reader, o.position) is not node for o in self._matmul_operands(reader)
        )

    def baddbmm_alpha(self) -> float | None:
        """Return ``alpha``, by which ``baddbmm`` scales its matmul; None where another op computes the scores."""
        adds = self.scores[:1] and self.scores[0].target == aten.baddbmm.default
        return float(argument(self.scores[0], 4)) if adds else None

    def _matmul_operands(self, reader: fx.Node) -> tuple[AttentionOperand, ...]:
        return tuple(AttentionOperand(reader, at) for at in _MATMUL_FACTORS.get(reader.target, ()))

    def score_scalings(self) -> tuple[list[fx.Node], fx.Node | None]:
        """Return the ops that scale or cap each score before a mask or bias is added, in order, and an unknown op.

        The unknown op is the first later one that does more to scores than add, mask or normalise them. It is None
        where there is none. ``baddbmm`` adds within the matmul, so for it the list is empty.
        """
        rest, scalings = list(self.scores[1:]), list[fx.Node]()
        while (
            self.baddbmm_alpha() is None
            and rest
            and rest[0].target in _SCORE_SCALINGS
            and len(rest[0].all_input_nodes) == 1
        ):
            scalings.append(rest.pop(0))
        return scalings, next((n for n in rest if n.target not in _SCORE_ADDITIONS), None)


@dataclass(frozen=True)
class NearAttention:
    """A softmax ``node`` that looks like that of an attention written out, and ``reason`` it is not understood."""

    node: fx.Node
    reason: str


def find_attention_cores(lifted: LiftedProgram) -> tuple[list[AttentionCore], list[NearAttention]]:
    """Return the attentions of a program in graph order, and the softmaxes that only look like one of an attention."""
    found = [c for n in lifted.graph.nodes if n.op == "call_function" and (c := match_attention(lifted, n)) is not None]
    return [c for c in found if isinstance(c, AttentionCore)], [c for c in found if isinstance(c, NearAttention)]


def describe_search(near: list[NearAttention]) -> str:
    """Return the part of an error message that says what was looked for, and names the first entry of ``near``."""
    nearest = f"; nearest is {near[0].node.name!r}: {near[0].reason}" if near else ""
    return f"looked for scaled_dot_product_attention, and for {EAGER_ATTENTION}{nearest}"


def match_attention(lifted: LiftedProgram, node: fx.Node) -> AttentionCore | NearAttention | None:
    """Return the attention whose output is ``node``.

    Gives a :class:`NearAttention` where the node looks like an attention and is not understood. Gives None where it
    does not look like one.
    """
    if node.target == SDPA:
        return AttentionCore(
            node, AttentionOperand(node, _QUERY), AttentionOperand(node, _KEY), AttentionOperand(node, _VALUE)
        )
    if node.target not in _MATMUL_FACTORS:
        return None
    attention_weights, values = (argument(node, at) for at in _MATMUL_FACTORS[node.target])
    weights_path = _path_to_softmax(attention_weights)
    if weights_path is None:
        transposed_path = _path_to_softmax(values, through_transposes=True)
        if transposed_path is None or not _score_matmuls(lifted, transposed_path[-1]):
            return None
        return NearAttention(transposed_path[-1], f"its chances are the second factor of {node.name!r}")
    softmax = weights_path[-1]
    matmuls = _score_matmuls(lifted, softmax)
    if not matmuls:
        return None
    if len(matmuls) > 1:
        names = " and ".join(repr(p.name) for p in matmuls[:2])
        return NearAttention(softmax, f"its scores are made of {len(matmuls)} products, {names} first")
    scores = [*_nodes_between(matmuls[0], softmax), *reversed(weights_path[:-1])]
    try:
        return _match_eager(node, matmuls[0], softmax, scores)
    except _NoMatch as error:
        return NearAttention(softmax, str(error))


class _NoMatch(Exception):
    pass


def _match_eager(node: fx.Node, matmul: fx.Node, softmax: fx.Node, scores: list[fx.Node]) -> AttentionCore:
    rank = len(_shape(softmax))
    if argument(softmax, 1) not in (-1, rank - 1):
        raise _NoMatch("it is not along the last axis")
    if turned := next((n for n in scores if n.target in _TRANSPOSES), None):
        raise _NoMatch(f"{turned.name!r} turns its scores")
    keys = _shape(matmul)[-1]
    if other := next((n for n in (scores[-1], node) if _lacks_key_axis(n, node, keys)), None):
        raise _NoMatch(f"{other.name!r} has not as many chances as there are keys")
    at_query, at_key = _MATMUL_FACTORS[matmul.target]
    query = _find_head_axis(AttentionOperand(matmul, at_query), single_reader=False)[0]
    key, key_views = _find_head_axis(AttentionOperand(matmul, at_key, is_transposed=True))
    value, value_views = _find_head_axis(AttentionOperand(node, _MATMUL_FACTORS[node.target][1]))
    return AttentionCore(node, query, key, value, tuple(scores), (*key_views, *value_views))


def _lacks_key_axis(last: fx.Node, node: fx.Node, keys: str) -> bool:
    return last is not node and _shape(last)[-1:] != [keys]


def _find_head_axis(
    operand: AttentionOperand, single_reader: bool = True
) -> tuple[AttentionOperand, list[tuple[fx.Node, int]]]:
    """Return the operand at the node where heads have an axis of their own, and the view that joins heads and batch.

    The view comes as a list of (node, axis of the keys), empty where the operand has four axes already.
    ``single_reader`` refuses an operand with a second reader on the way. Raises _NoMatch where no such node is
    found.
    """
    is_transposed = operand.is_transposed
    node: Any = operand.node
    views: list[tuple[fx.Node, int]] = []
    if len(_shape(node)) == 4:
        return operand, []
    while True:
        readers = [u for u in node.users if not is_metadata_assert(u)] if isinstance(node, fx.Node) else []
        if not readers or (single_reader and len(readers) > 1):
            raise _NoMatch(f"what {operand.reader.name!r} reads has heads and batches on one axis, or none")
        if _swaps_last_axes(node):
            is_transposed = not is_transposed
        elif (
            node.target in SHAPE_VIEWS
            and len(_shape(node.args[0])) == 4
            and _shape(node.args[0])[2:] == _shape(node)[1:]
        ):
            return AttentionOperand(node, 0, is_transposed), [(node, 2 if is_transposed else 1), *views]
        else:
            raise _NoMatch(f"{node.name!r} has no axis of heads, nor is it a view of what has one")
        node = node.args[0]


def _path_to_softmax(node: Any, through_transposes: bool = False) -> list[fx.Node] | None:
    """Return the nodes from the attention weights ``node`` back to their softmax, which is last.

    Gives None where there is no softmax. ``turned`` also passes through transposes.
    """
    path: list[fx.Node] = []
    allowed = (*_AFTER_SOFTMAX, *_TRANSPOSES) if through_transposes else _AFTER_SOFTMAX
    while isinstance(node, fx.Node) and node.op == "call_function":
        path.append(node)
        if node.target in _SOFTMAX:
            return path
        if node.target not in allowed:
            return None
        read = [argument(node, at) for at in _WHERE_BRANCHES.get(node.target, (0,))]
        node = max(read, key=lambda n: len(_shape(n)))
    return None


def _score_matmuls(lifted: LiftedProgram, softmax: fx.Node) -> list[fx.Node]:
    """Return the matmuls of two activations that the input of ``softmax`` is computed from."""
    matmuls: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack: list[Any] = [softmax.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or not _is_tensor(node) or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _MATMUL_FACTORS:
            if not any(_is_weight(lifted, argument(node, at)) for at in _MATMUL_FACTORS[node.target]):
                matmuls.append(node)
            if node.target == aten.baddbmm.default:
                stack.append(argument(node, 0))
        elif node.target not in LAYER_OPS and node.target != SDPA and node.target not in _SOFTMAX:
            stack += node.all_input_nodes
    return matmuls


def _is_weight(lifted: LiftedProgram, node: Any) -> bool:
    while isinstance(node, fx.Node) and (
        node.target in CASTS or node.target in _TRANSPOSES or node.target in SHAPE_VIEWS
    ):
        node = node.args[0]
    fixed = isinstance(node, fx.Node) and node.op == "placeholder"
    return fixed and lifted.input_specs[node.name].kind != InputKind.USER_INPUT


def _nodes_between(matmul: fx.Node, softmax: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes on the way from ``matmul`` to ``softmax`` in graph order, both included."""
    ancestors, stack = {softmax}, [softmax]
    while stack:
        new_ancestors = {n for n in stack.pop().all_input_nodes if n not in ancestors and _is_tensor(n)} - {matmul}
        ancestors |= new_ancestors
        stack += [n for n in new_ancestors if n.target not in LAYER_OPS]
    reached = {matmul}
    for node in matmul.graph.nodes:
        if node is matmul or (node in ancestors and not reached.isdisjoint(node.all_input_nodes)):
            reached.add(node)
            yield node
        if node is softmax:
            return


def _swaps_last_axes(node: Any) -> bool:
    """Return whether ``node`` swaps the last two axes of its input."""
    if not isinstance(node, fx.Node) or node.target not in _TRANSPOSES:
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
