"""Scale the input of an up projection and not its output: linear(h, B) * s -> linear(h * s, B).

``h`` has as many columns as an adapter has ranks, and the output as many as the layer. For runtimes that fuse no
multiplication into a product, this saves one pass over each output. The values stay the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.torch_typing import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class EarlyScales(GraphPass):
    """A pass that scales inputs in place of outputs; its count is that of the scales."""

    name: ClassVar[str] = "early_scales"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        found = [(n, *match) for n in subject.nodes if (match := _match(n)) is not None]
        for node, linear, scale in found:
            hidden = argument(linear, 0)
            with subject.inserting_before(linear):
                scaled = subject.call_function(aten.mul.Tensor, (hidden, scale))
            scaled.meta["val"] = hidden.meta["val"] * scale.meta["val"]
            linear.update_arg(0, scaled)
            node.replace_all_uses_with(linear)
            subject.erase_node(node)
        return PassResult(subject, len(found))


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return (linear, scale) of a product by one number that an input has, whose linear widens; else None."""
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    for linear, scale in (node.args[:2], node.args[1::-1]):
        assert isinstance(linear, fx.Node)
        assert isinstance(scale, fx.Node)
        if linear.target is aten.linear.default and scale.op == "placeholder" and _may_move(linear, scale):
            return linear, scale
    return None


def _may_move(linear: fx.Node, scale: fx.Node) -> bool:
    if argument(linear, 2) is not None or len(linear.users) != 1:
        return False
    hidden, weight, factor = (n.meta["val"] for n in (argument(linear, 0), argument(linear, 1), scale))
    if not isinstance(factor, Tensor) or factor.ndim > 1 or factor.dtype != hidden.dtype:
        return False
    if any(isinstance(n, torch.SymInt) or n != 1 for n in shape_of(factor)):
        return False
    wide, narrow = shape_of(weight)
    return isinstance(narrow, torch.SymInt) or (isinstance(wide, int) and narrow < wide)
