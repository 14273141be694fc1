"""Let reads of memory by strides see one layout, whatever computes the value that they read.

``as_strided`` takes elements of memory, and its strides are those that the model's own values had. A pass that computes
a value another way, or a compiler that lays it out otherwise, gives the same values in other places. So the value whose
memory is read is made contiguous first, in the order of axes that it had in the model. There that copies nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from adaptc.passes.graph.higher_order import copy_bodies, find_higher_order_calls, module_with_graph
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import find_written_nodes, is_view
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.symbolic_fakes import suppress_size_guards

aten = torch.ops.aten
_READS = aten.as_strided.default


@dataclass(frozen=True)
class SettleStrides(Pass):
    """A pass that settles the layouts that ``as_strided`` reads; its count is that of the reads.

    Reads stay where the memory is written to, has gaps, or has sizes that only values tell. Without others it returns
    the program itself.
    """

    name: ClassVar[str] = "settle_strides"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        bodies = [m for m in subject.graph_module.modules() if isinstance(m, fx.GraphModule)]
        if not any(m.graph.find_nodes(op="call_function", target=_READS) for m in bodies):
            return PassResult(subject, 0)
        lifted = LiftedProgram(subject)
        root = module_with_graph(subject.graph_module, lifted.graph)
        for call in find_higher_order_calls(root):
            copy_bodies(call)
        count = 0
        for body in root.modules():
            if isinstance(body, fx.GraphModule):
                count += _settle_graph(body.graph)
                body.recompile()
        return PassResult(lifted.finish(root), count) if count else PassResult(subject, 0)


def _settle_graph(graph: fx.Graph) -> int:
    dirty, _ = find_written_nodes(graph)
    return sum(_settle(n, dirty) for n in graph.find_nodes(op="call_function", target=_READS))


def _settle(node: fx.Node, dirty: Collection[fx.Node]) -> bool:
    """Make the memory that ``node`` reads contiguous, and return whether that could be done."""
    source: Any = node.args[0]
    offset = argument(node, 3)
    if offset is None:
        offset = source.meta["val"].storage_offset()
    while source.op == "call_function" and is_view(source):
        source = source.args[0]
    value = source.meta.get("val")
    if node in dirty or source in dirty or not isinstance(value, Tensor) or isinstance(offset, torch.SymInt):
        return False
    if any(free_unbacked_symbols(n) for n in (*value.shape, *value.stride())):
        return False  # what only values tell, torch cannot compare
    with suppress_size_guards([value]):
        # Sizes of one may have any stride; of two equal strides the larger size is the outer one.
        order = sorted(range(value.ndim), key=lambda i: (int(value.stride(i)), int(value.shape[i])), reverse=True)
        permuted = value.permute(order)
        if not permuted.is_contiguous() or value.storage_offset() != 0:
            return False
    with node.graph.inserting_before(node):
        if order != sorted(order):
            source = _add(node, aten.permute.default, (source, order), permuted)
        source = _add(node, aten.contiguous.default, (source,), permuted)
    node.args = (source, *(argument(node, i) for i in (1, 2)), offset)
    return True


def _add(node: fx.Node, target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    made = node.graph.call_function(target, args)
    made.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")} | {"val": value}
    return made
