"""Call the functions that Python's torch binds instead of operator overloads, in graphs that an interpreter runs.

The operators and their arguments stay the same. An overload is called through a schema, which costs about a microsecond
more than the generated function. One token of a small model takes a thousand calls. Only overloads in the tables below
are rebound. Attention goes to a function that computes packed texts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.segment_attention import attention_by_segment
from adaptc.passes.protocol.low_rank_rows import low_rank_rows_direct
from adaptc.passes.protocol.matmul_op import linear_matmul
from adaptc.torch_modes import in_transform

aten = torch.ops.aten

#: function -> the overloads of its op whose schema has the arguments in the function's order
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    torch.add: ("Tensor",),
    torch.sub: ("Tensor",),
    torch.mul: ("Tensor",),
    torch.div: ("Tensor",),
    torch.neg: ("default",),
    torch.rsqrt: ("default",),
    torch.sqrt: ("default",),
    torch.exp: ("default",),
    torch.sin: ("default",),
    torch.cos: ("default",),
    torch.tanh: ("default",),
    torch.sigmoid: ("default",),
    torch.relu: ("default",),
    torch.pow: ("Tensor_Scalar",),
    torch.mean: ("dim",),
    torch.cat: ("default",),
    torch.matmul: ("default",),
    torch.mm: ("default",),
    torch.bmm: ("default",),
    torch.transpose: ("int",),
    torch.permute: ("default",),
    torch.unsqueeze: ("default",),
    torch.reshape: ("default",),
    torch.softmax: ("int",),
    torch.split_with_sizes: ("default",),
    torch.conv1d: ("default", "padding"),
    torch.conv2d: ("default", "padding"),
    torch.conv3d: ("default", "padding"),
    F.linear: ("default",),
    F.gelu: ("default",),
    F.silu: ("default",),
}
#: overload -> the method of Tensor that does the same
_TENSOR_METHODS: dict[Any, str] = {
    aten.view.default: "view",
    aten.expand.default: "expand",
    aten.t.default: "t",
    # the only form of this op that vmap can follow
    aten.sym_size.int: "size",
}
#: dtype -> the method that casts to it, at half the cost of the overload
_CAST_METHODS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}


def _add_matmul(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add x y to ``total`` in place and return it. Transforms get an addition, for which vmap has a rule."""
    return total.add_(x @ y) if in_transform() else total.addmm_(x, y)


def _direct_functions() -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for function, overloads in _FUNCTIONS.items():
        packet = getattr(aten, function.__name__)
        out |= {getattr(packet, o): function for o in overloads}
    out[torch.ops.adaptc.product.default] = linear_matmul
    out[aten.addmm_.default] = _add_matmul
    out[torch.ops.adaptc.low_rank_rows.default] = low_rank_rows_direct
    out[aten.scaled_dot_product_attention.default] = attention_by_segment
    return out


DIRECT_FUNCTIONS: dict[Any, Any] = _direct_functions()


@dataclass(frozen=True)
class CallSizesDirectly(GraphPass):
    """A pass that rebinds only the ops that read sizes, for graphs that a compiler may get. The count is theirs."""

    name: ClassVar[str] = "call_sizes_directly"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        sizes = list(subject.find_nodes(op="call_function", target=aten.sym_size.int))
        for node in sizes:
            node.op, node.target = "call_method", _TENSOR_METHODS[aten.sym_size.int]
        return PassResult(subject, len(sizes))


@dataclass(frozen=True)
class CallDirectly(GraphPass):
    """A pass that rebinds all overloads in the tables. The count is that of the rebound calls."""

    name: ClassVar[str] = "call_directly"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        count = 0
        for node in subject.nodes:
            if node.op != "call_function":
                continue
            if (
                node.target is aten.to.dtype
                and len(node.args) == 2
                and not node.kwargs
                and node.args[1] in _CAST_METHODS
            ):
                node.op, node.target, node.args = "call_method", _CAST_METHODS[node.args[1]], node.args[:1]  # type: ignore[index]
            elif node.target in DIRECT_FUNCTIONS:
                node.target = DIRECT_FUNCTIONS[node.target]
            elif node.target in _TENSOR_METHODS:
                node.op, node.target = "call_method", _TENSOR_METHODS[node.target]
            else:
                continue
            count += 1
        return PassResult(subject, count)
