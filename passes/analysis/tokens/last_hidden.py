"""Find the last hidden state of a program: the input of its head, or its output where it has no head.

The head is the layer whose output the caller gets. It is seen through views, casts, the choice of some tokens and
elementwise ops (a soft cap of the logits). Of a model without a head the hidden state is what the caller gets.

Takes an opened program without adapters, and does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import OutputKind

from adaptc.passes.analysis.tokens.token_axes import sizes_of
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import CASTS, LAYER_OPS, argument

aten = torch.ops.aten

#: ops that are followed to their first argument: casts, views, and choices of some tokens
_FOLLOWED_OPS = (
    *CASTS,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.squeeze.dim,
    aten.split.Tensor,
    aten.flatten.using_ints,
)


def find_last_hidden(lifted: LiftedProgram, ids: fx.Node, hidden_size: int) -> fx.Node | None:
    """Return the node with the hidden state (batch, length, width) of the tokens ``ids`` (batch, length).

    It is the last one before the head. None where there is none of this width.
    """
    return next((n for n in _candidates(lifted, ids) if n.meta["val"].shape[2] == hidden_size), None)


def last_hidden_sizes(lifted: LiftedProgram, ids: fx.Node) -> list[int]:
    """Return the widths for which ``ids`` have a last hidden state; the width that the head reads comes first."""
    widths = [n.meta["val"].shape[2] for n in _candidates(lifted, ids)]
    return [w for w in dict.fromkeys(widths) if isinstance(w, int)]


def _candidates(lifted: LiftedProgram, ids: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that may be the last hidden state of ``ids``: inputs of heads first, then outputs."""
    headless: list[fx.Node] = []
    for output in _outputs(lifted):
        for node in _follow_back(output):
            if node.op == "call_function" and node.target in LAYER_OPS:
                yield from (
                    n for n in _follow_back(argument(node, LAYER_OPS[node.target][1])) if _is_hidden_state(n, ids)
                )
            elif _is_hidden_state(node, ids):
                headless.append(node)
    yield from headless


def _outputs(lifted: LiftedProgram) -> Iterator[fx.Node]:
    values: Any = lifted.graph.output_node().args[0]
    for value, spec in zip(values, lifted.output_specs, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(value, fx.Node):
            yield value


def _follow_back(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node``, its input where it is a view or elementwise op, that one's input, and so on."""
    while True:
        yield node
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        is_elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(inputs) == 1
        if not inputs or not (is_elementwise or node.target in _FOLLOWED_OPS):
            return
        node = inputs[0]


def _is_hidden_state(node: fx.Node, ids: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3 or node.op != "call_function":
        return False
    return sizes_of(value)[:2] == sizes_of(ids.meta["val"]) and value.is_floating_point()
