"""Where the last hidden state of a program is: what its head reads, or what it gives where it has none.

The head is the layer whose output a caller gets, seen through views, casts, the choice of some tokens and what works on
each number alone (a soft cap of the logits). Of a model without a head the hidden state is what the caller gets.

Before: an opened program without adapters. After: it is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.export.graph_signature import OutputKind

from adaptc.passes.analysis.token_axes import sizes_of
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import CASTS, TABLE, argument

aten = torch.ops.aten

#: ops whose first argument is seen through them: other views, and choices of some tokens
_THROUGH = (
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


def last_hidden(lifted: Lifted, ids: fx.Node, width: int) -> fx.Node | None:
    """The node with the hidden state (batch, length, width) of the tokens ``ids`` (batch, length), the one that comes
    last before the head; None where there is none."""
    return next((n for n in _candidates(lifted, ids) if n.meta["val"].shape[2] == width), None)


def hidden_widths(lifted: Lifted, ids: fx.Node) -> list[int]:
    """The widths for which there is a last hidden state of ``ids``, the one that the head reads first."""
    widths = [n.meta["val"].shape[2] for n in _candidates(lifted, ids)]
    return [w for w in dict.fromkeys(widths) if isinstance(w, int)]


def _candidates(lifted: Lifted, ids: fx.Node) -> Iterator[fx.Node]:
    """What may be the last hidden state of ``ids``: what a head reads, and then what is given."""
    bare: list[fx.Node] = []
    for output in _outputs(lifted):
        for node in _behind(output):
            if node.op == "call_function" and node.target in TABLE:
                yield from (n for n in _behind(argument(node, TABLE[node.target][1])) if _is(n, ids))
            elif _is(node, ids):
                bare.append(node)
    yield from bare


def _outputs(lifted: Lifted) -> Iterator[fx.Node]:
    values = lifted.graph.output_node().args[0]
    for value, spec in zip(values, lifted.outputs, strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(value, fx.Node):
            yield value


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it shows, one after the other."""
    while True:
        yield node
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        alone = torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(inputs) == 1
        if not inputs or not (alone or node.target in _THROUGH):
            return
        node = inputs[0]


def _is(node: fx.Node, ids: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3 or node.op != "call_function":
        return False
    return sizes_of(value)[:2] == sizes_of(ids.meta["val"]) and value.is_floating_point()
