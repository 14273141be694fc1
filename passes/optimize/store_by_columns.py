"""Give a compiler the up-projections of adapters column by column: linear(h, B) -> linear(h, t(contiguous(t(B)))).

Takes the graph of calls on a CPU that a compiler gets. Values stay the same up to the order of a sum. A layer for one
row is a loop over outputs, and each output of a thin B is a sum over a few numbers. Row by row, every such sum ends
with an addition across a register. Column by column, whole registers of outputs are summed. ``hoist`` makes the copy
once per binding. It is as large as B.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.torch_typing import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class StoreByColumns(GraphPass):
    """A pass that stores thin weights by columns. The count is that of the weights, and ``data`` are their new nodes.

    ``stages`` are the frozen placeholders, as :class:`~adaptc.passes.optimize.hoist.Hoist` takes them. Weights that
    depend on those of the last stage are the adapter's.
    """

    name: ClassVar[str] = "store_by_columns"

    stages: Sequence[Collection[str]] = field(repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        stages = stage_by_node(subject, self.stages)
        last = len(self.stages) - 1
        stored: dict[fx.Node, fx.Node] = {}
        for linear in subject.find_nodes(op="call_function", target=aten.linear.default):
            weight = argument(linear, 1)
            if stages.get(weight) != last or not _is_thin(weight.meta.get("val")):
                continue
            if weight not in stored:
                with subject.inserting_after(weight):
                    stored[weight] = _by_columns(subject, weight)
            linear.update_arg(1, stored[weight])
        return PassResult(subject, len(stored), data=tuple(stored.values()))


def _is_thin(value: Any) -> bool:
    """Return whether ``value`` is a weight (N, K) on a CPU with fewer columns than rows."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.device.type != "cpu":
        return False
    rows, columns = shape_of(value)
    return isinstance(rows, int) and isinstance(columns, int) and columns < rows


def _by_columns(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """Return a new node behind ``weight`` with its values, one column after another in memory."""
    contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
    steps: list[tuple[Any, dict[str, Any]]] = [(aten.t.default, {}), (aten.clone.default, contiguous)]
    node = weight
    for target, options in (*steps, steps[0]):
        with graph.inserting_after(node), torch.no_grad():
            value = target(node.meta["val"], **options)
            node = graph.call_function(target, (node,), options)
            node.meta["val"] = value
    return node
