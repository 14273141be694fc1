"""Find the axes of a value along which a call's tokens lie, by the sizes in the graph.

Tokens lie along the first two axes, (batch, length, ...), or row after row along the first axis, (batch * length, ...).
The second kind comes from the first by a reshape, and by ops that work on each entry of the first axis alone. Nothing
is run and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import CASTS, LAYER_OPS, argument
from adaptc.torch_typing import shape_of, symbolic_expression

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
#: ops, besides elementwise ones, that compute each entry of the first axis from the same entry of their input
_ENTRYWISE = (*CASTS, aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int, aten.dropout.default)


def why_not_per_token(ids: fx.Node, value: fx.Node) -> str:
    """Return why ``value`` does not have one entry for each token of ``ids`` (batch, length); '' where it does."""
    tensor = value.meta.get("val")
    if not isinstance(tensor, Tensor):
        return "it is read by a layer with several results"
    rows, length = sizes_of(ids.meta["val"])
    if rows == length:
        return f"the program was captured for {rows} rows of {length} tokens, so that nothing tells the two apart"
    shape = sizes_of(tensor)
    if shape[:2] == [rows, length] and len(shape) > 2:
        return ""
    if len(shape) > 1 and _is_token_count(shape[0], rows, length) and _is_row_major(value, rows, length):
        return ""
    return f"its output {tuple(map(str, shape))} is not one for each of the ({rows}, {length}) tokens of {ids.name!r}"


def _is_row_major(value: fx.Node, rows: Any, length: Any) -> bool:
    """Return whether a value with all tokens along its first axis has them row after row."""
    stack, seen = [value], {value}
    while stack:
        for node in entrywise_inputs(stack.pop()):
            tensor = node.meta.get("val")
            if node in seen or not isinstance(tensor, Tensor) or not tensor.ndim:
                continue
            shape = sizes_of(tensor)
            if shape[:2] == [rows, length]:
                return True
            if _is_token_count(shape[0], rows, length):
                seen.add(node)
                stack.append(node)
    return False


def entrywise_inputs(node: fx.Node) -> Sequence[fx.Node]:
    """Return the inputs of an op that its output follows entry by entry along the first axis; () for other ops."""
    if node.op != "call_function":
        return ()
    if node.target in LAYER_OPS:
        return (argument(node, LAYER_OPS[node.target][1]),)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if pointwise or node.target in (*_RESHAPES, *_ENTRYWISE):
        return node.all_input_nodes
    return ()


def sizes_of(tensor: Tensor) -> list[Any]:
    """Return the sizes of ``tensor`` as sympy expressions, which are equal where the program knows that sizes are."""
    return [symbolic_expression(s) if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in shape_of(tensor)]


def _is_token_count(size: Any, rows: Any, length: Any) -> bool:
    return sympy.expand(size - rows * length) == 0
