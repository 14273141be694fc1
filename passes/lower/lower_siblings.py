"""Fuse lowered layers that read the same input: one matmul, one down projection, and one kernel that adds the updates.

Takes a lowered graph, and its frozen nodes. Where several layers with LoRA read the same rows x, they become

    y = linear(x, [W1; W2; W3])                    the weights one buffer, as in fuse_siblings
    h = lora_down(x, [A1; A2; A3])                 stacked once per binding, by hoisting
    lora_up_add_siblings(y, h, [B1, B2, B3], ...)  ranks and scales from a table, no blocks of zeros

in three launches instead of three for each layer. This is for many rows: for few rows, one kernel per layer reads less.
No node has a rank: the table is made from the shapes of the factors, once per binding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.passes.graph.mutation import find_written_nodes
from adaptc.passes.graph.ops import argument
from adaptc.passes.optimize.emit_fused_siblings import SiblingFuser, StackedWeight
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.passes.optimize.sibling_groups import GroupLayer, SiblingGroup, accepts_strided

aten, ours = torch.ops.aten, torch.ops.adaptc


@dataclass(frozen=True)
class LowerSiblings(FuseSiblings):
    """A pass that fuses lowered siblings, with options, data and count of its base; ``stacked`` has no meaning here."""

    name: ClassVar[str] = "lower_siblings"

    def find_groups_in(self, graph: fx.Graph) -> list[SiblingGroup]:
        return find_lowered_groups(graph, self.stackable, stage_by_node(graph, self.stages))

    def make_fuser(
        self,
        graph: fx.Graph,
        group: SiblingGroup,
        packs: dict[tuple[str, ...], StackedWeight],
        made: dict[Any, fx.Node],
    ) -> SiblingFuser:
        return LoweredFuser(graph, group, self.user_inputs, packs, stacked=False, frozen_nodes=made)


def find_lowered_groups(graph: fx.Graph, base: Collection[str], frozen: Collection[fx.Node]) -> list[SiblingGroup]:
    """Return the groups of lowered layers with LoRA in ``graph`` that read one tensor.

    ``base`` has the placeholders of weights that may be packed. ``frozen`` has the nodes that are constant in a
    binding.
    """
    import adaptc.kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]  # makes torch know the ops

    dirty, kept = find_written_nodes(graph)
    groups: dict[Any, SiblingGroup] = {}
    for node in graph.find_nodes(op="call_function", target=ours.lora_linear.default):
        x, weight, bias, A, B, scale = node.args
        if weight.name not in base or not weight.meta["val"].is_contiguous() or node in kept or x in dirty:
            continue
        if not {n for n in (bias, A, B, scale) if n is not None} <= set(frozen) or not accepts_strided(node, kept):
            continue
        kinds = (weight.meta["val"].dtype, A.meta["val"].dtype, scale.meta["val"].dtype, bias is None)
        group = groups.setdefault((x, *kinds), SiblingGroup(x))
        if all(m.weight is not weight for m in group.layers):
            group.layers.append(GroupLayer(node))
    return [g for g in groups.values() if g.is_worth_fusing()]


class LoweredFuser(SiblingFuser):
    """A writer of a group of :func:`find_lowered_groups`."""

    def input_nodes(self) -> list[fx.Node]:
        return [n for m in self.group.layers for n in m.linear.args[2:] if n is not None]  # type: ignore[misc]

    def emit(self) -> None:
        from adaptc.kernels import sibling_table_op

        members, x = self.group.layers, self.group.x
        widths = [m.width for m in members]
        A, B, scales = ([argument(m.linear, i) for m in members] for i in (3, 4, 5))
        bias = [] if members[0].bias is None else [self.cat([m.bias for m in members])]  # type: ignore[misc]
        y = self.add_call(aten.linear.default, x, self.weight_node(), *bias)
        h = self.add_call(ours.lora_down.default, x, self.cat(A))
        flat = [self.add_frozen(aten.reshape.default, self.add_frozen(aten.t.default, b), [-1]) for b in B]
        table = self.add_frozen(sibling_table_op, B)
        scale = self.add_frozen(aten.stack.default, scales)
        y = self.add_call(ours.lora_up_add_siblings.default, y, h, self.cat(flat), table, scale, widths)
        self.replace_outputs(y, widths)
