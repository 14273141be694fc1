"""Keep rows of attention that attend to nothing finite, for runtimes whose softmax of nothing is not a number.

A padded position of a sliding window has no key that its mask lets through. torch gives it zeros. Where a runtime gives
NaN, the next layer mixes it into all positions, since zero times NaN is NaN.

    before    attention(q, k, v, mask)
    after     where(some, attention(q, k, v, mask | ~some), 0),  some = mask.any(-1, keepdim=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.propagate import propagate_fakes

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_MASK = 3


@dataclass(frozen=True)
class KeepMaskedRowsFinite(Pass):
    """A pass that rewrites attention with a boolean mask; its count is that of the attentions."""

    name: ClassVar[str] = "keep_masked_rows_finite"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        graph, made = lifted.graph, list[fx.Node]()
        found = [n for n in graph.find_nodes(op="call_function", target=_ATTENTION) if _has_boolean_mask(n)]
        known: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

        def call(target: Any, *args: Any) -> fx.Node:
            made.append(graph.call_function(target, args))
            return made[-1]

        for node in found:
            mask = argument(node, _MASK)
            if mask not in known:
                with graph.inserting_before(node):
                    some = call(aten.any.dim, mask, -1, True)
                    known[mask] = some, call(aten.logical_or.default, mask, call(aten.logical_not.default, some))
            some, fuller = known[mask]
            node.replace_input_with(mask, fuller)
            readers = list(node.users)
            with graph.inserting_after(node):
                rows = call(aten.where.ScalarOther, some, node, 0)
            for reader in readers:
                reader.replace_input_with(node, rows)
        if made:
            propagate_fakes(graph, made, lifted.program.graph_module)
        return PassResult(lifted.finish() if made else subject, len(found))


def _has_boolean_mask(node: fx.Node) -> bool:
    mask = argument(node, _MASK)
    value = mask.meta.get("val") if isinstance(mask, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype is torch.bool
