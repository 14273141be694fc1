"""Add the changes of per-row adapters in place, where nothing else reads the tensor that they are added to.

The graph is one of calls for an interpreter, and its values stay the same. ``adaptc::low_rank_rows`` becomes
``low_rank_rows_in_place`` if a layer just computed its ``y`` and nothing else reads that. So does ``grouped_rows``, its
form of kernels for a GPU. A new tensor for the sum
would cost as much as the adapters themselves: it is large, so its memory is fresh, and the first touch of each page is
a page fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import adaptc.passes.protocol.matmul_op  # noqa: F401  # pyright: ignore[reportUnusedImport]  # makes torch know its op
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.protocol.low_rank_rows import low_rank_rows_in_place

aten, ours = torch.ops.aten, torch.ops.adaptc

#: ops whose result may be overwritten, since no other value of the graph has its memory
_UNALIASED_OPS: tuple[Any, ...] = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    ours.product.default,
    ours.low_rank_rows.default,
    low_rank_rows_in_place,
)


@dataclass(frozen=True)
class AddInPlace(GraphPass):
    """A pass that adds per-row changes in place. The count is that of the sums in place."""

    name: ClassVar[str] = "add_in_place"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        count = 0
        for op, in_place in _in_place_forms(subject).items():
            for node in subject.find_nodes(op="call_function", target=op):
                y = argument(node, 1)
                read = [n for n in node.all_input_nodes if n is not y]
                if y.target in _UNALIASED_OPS and list(y.users) == [node] and len(read) == len(node.args) - 1:
                    node.target = in_place
                    count += 1
        return PassResult(subject, count)


def _in_place_forms(graph: fx.Graph) -> dict[Any, Any]:
    """Return op -> the function that computes it in place, for the ops that ``graph`` may have."""
    forms: dict[Any, Any] = {ours.low_rank_rows.default: low_rank_rows_in_place}
    if any(str(n.target) == "adaptc.grouped_rows.default" for n in graph.nodes):
        from adaptc.kernels import grouped_rows_in_place

        forms[ours.grouped_rows.default] = grouped_rows_in_place
    return forms
