"""Fold a frozen scale into the weight that it follows: linear(h, B) * s -> linear(h, B * s).

The values stay the same up to the rounding of one multiplication. The scale then multiplies a weight and not every
output of every call, and ``hoist`` takes that multiplication out of the call. It is not done where it would cost
memory: weights that several sites share stay shared. In half precision the scaled weight is rounded where the scaled
output was. If the scale is a power of two, nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.hoist import stage_by_node

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScales(GraphPass):
    """A pass that folds frozen scales. ``data`` is the tuple of new weights, and the count is their number.

    ``stages`` are the frozen placeholders, as :class:`~adaptc.passes.optimize.hoist.Hoist` takes them.
    """

    name: ClassVar[str] = "fold_scales"

    stages: Sequence[Collection[str]] = field(repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        made = _fold_scales(subject, stage_by_node(subject, self.stages))
        return PassResult(subject, len(made), data=tuple(made))


def _fold_scales(graph: fx.Graph, frozen: Collection[fx.Node]) -> list[fx.Node]:
    """Fold the scales in ``graph`` and return the nodes of the scaled weights.

    ``frozen`` are the nodes that depend on frozen inputs alone.
    """
    scaled_weights: list[fx.Node] = []
    for node in list(graph.nodes):
        found = _match_scaled_linear(node, frozen)
        if found is None:
            continue
        linear, scale = found
        weight: fx.Node = argument(linear, 1)
        move_before(linear, scale)
        with graph.inserting_before(linear):
            column = scale
            if scale.meta["val"].ndim:
                column = graph.call_function(aten.unsqueeze.default, (scale, 1))
                column.meta["val"] = scale.meta["val"].unsqueeze(1)
            scaled = graph.call_function(aten.mul.Tensor, (weight, column))
            scaled.meta["val"] = torch.empty_like(weight.meta["val"], requires_grad=False)
        linear.update_arg(1, scaled)
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
        scaled_weights.append(scaled)
    return scaled_weights


def _match_scaled_linear(node: fx.Node, frozen: Collection[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Return (linear without bias, frozen scale) if the node is a multiplication that can be folded; else None."""
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    for linear, scale in (node.args[:2], node.args[1::-1]):
        assert isinstance(linear, fx.Node)
        assert isinstance(scale, fx.Node)
        if linear.target is aten.linear.default and len(linear.users) == 1 and _can_fold(linear, scale, frozen):
            return linear, scale
    return None


def _can_fold(linear: fx.Node, scale: fx.Node, frozen: Collection[fx.Node]) -> bool:
    weight, bias = argument(linear, 1), argument(linear, 2)
    if bias is not None or weight not in frozen or scale not in frozen or len(weight.users) > 1:
        return False
    w, s = (n.meta["val"] for n in (weight, scale))
    if not isinstance(w, Tensor) or not isinstance(s, Tensor) or not w.is_floating_point():
        return False
    if s.ndim == 0:  # a 0-d scale does not change the weight's dtype by type promotion
        return s.is_floating_point()
    return s.dtype == w.dtype and tuple(s.shape) == (w.shape[0],)


def move_before(anchor: fx.Node, node: fx.Node) -> None:
    """Move a frozen node, and the nodes it is made from, in front of ``anchor`` if they stand behind it."""
    if node.op != "placeholder" and node > anchor:
        for source in node.all_input_nodes:
            move_before(anchor, source)
        anchor.prepend(node)
