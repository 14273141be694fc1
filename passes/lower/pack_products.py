"""Base linear layers read a packed copy of their weight, at the numbers of rows at which that is faster.

Before: a graph of calls on a CPU whose products were chosen, and somebody who packs weights. After: the same values up
to rounding; the layers that somebody packs for are calls of what it gives, on the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.pass_infra import GraphPass, PassResult
from adaptc.passes.ir.product import LINEAR

#: (rows, columns, type of a weight, and what an ``adaptc::product`` of it is told now) -> what takes (x, weight, bias),
#: or None
Make = Callable[[int, int, torch.dtype, Sequence[Any]], Callable[..., Tensor] | None]


@dataclass(frozen=True)
class PackProducts(GraphPass):
    """``base``: the placeholders of weights of the base; ``make``: see :data:`Make`."""

    name: ClassVar[str] = "pack_products"

    base: Collection[str] = field(repr=False)
    make: Make = field(repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        count = 0
        kinds: dict[Any, Any] = {
            torch.ops.aten.linear.default: lambda n: (LINEAR, ()),
            torch.ops.adaptc.product.default: lambda n: n.args[3:],
        }
        for node in [n for n in subject.nodes if n.op == "call_function" and n.target in kinds]:
            x, weight, bias = (argument(node, i) for i in range(3))
            value = weight.meta.get("val")
            if weight.op != "placeholder" or weight.name not in self.base or not isinstance(value, Tensor):
                continue
            if value.ndim != 2 or value.device.type != "cpu" or not all(isinstance(s, int) for s in value.shape):
                continue
            out, width = map(int, value.shape)
            made = self.make(out, width, value.dtype, kinds[node.target](node))
            if made is not None:
                node.target, node.args, node.kwargs = made, (x, weight, bias), {}
                count += 1
        return PassResult(subject, count)
