"""Let base linear layers read a packed copy of their weight, at the row counts at which that is faster.

Takes a graph for inference on a CPU whose matmuls were chosen, and a function that packs weights. Layers for which it
returns a callable become calls of that, on the same arguments. Values stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.protocol.matmul_op import LINEAR
from adaptc.torch_typing import shape_of

#: (rows, columns, dtype of a weight, the remaining arguments of its ``adaptc::product``) -> a callable that takes
#: (x, weight, bias), or None to leave the layer as it is
MakePackedLayer = Callable[[int, int, torch.dtype, Sequence[Any]], Callable[..., Tensor] | None]


@dataclass(frozen=True)
class PackWeights(GraphPass):
    """A pass that lets layers read packed weights; its count is that of the layers.

    ``base`` has the placeholders of base weights; ``make_layer`` packs them, see :data:`MakePackedLayer`.
    """

    name: ClassVar[str] = "pack_weights"

    base: Collection[str] = field(repr=False)
    make_layer: MakePackedLayer = field(repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        count = 0
        matmul_arguments: dict[Any, Callable[[fx.Node], tuple[Any, ...]]] = {
            torch.ops.aten.linear.default: lambda n: (LINEAR, ()),
            torch.ops.adaptc.product.default: lambda n: n.args[3:],
        }
        for node in [n for n in subject.nodes if n.op == "call_function" and n.target in matmul_arguments]:
            x, weight, bias = (argument(node, i) for i in range(3))
            value = weight.meta.get("val")
            if weight.op != "placeholder" or weight.name not in self.base or not isinstance(value, Tensor):
                continue
            if value.ndim != 2 or value.device.type != "cpu" or not all(isinstance(s, int) for s in shape_of(value)):
                continue
            out, width = map(int, value.shape)
            made = self.make_layer(out, width, value.dtype, matmul_arguments[node.target](node))
            if made is not None:
                node.target, node.args, node.kwargs = made, (x, weight, bias), {}
                count += 1
        return PassResult(subject, count)
