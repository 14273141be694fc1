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

from adaptc.passes.graph.mutation import touched
from adaptc.passes.graph.ops import argument
from adaptc.passes.optimize.emit_fused_siblings import Fuser, Pack
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stages_of
from adaptc.passes.optimize.sibling_groups import Group, Member, takes_slices

aten, ours = torch.ops.aten, torch.ops.adaptc


@dataclass(frozen=True)
class LowerSiblings(FuseSiblings):
    """A pass that fuses lowered siblings, with options, data and count of its base; ``stacked`` has no meaning here."""

    name: ClassVar[str] = "lower_siblings"

    def groups(self, graph: fx.Graph) -> list[Group]:
        return find_lowered(graph, self.packable, stages_of(graph, self.stages))

    def fuser(
        self, graph: fx.Graph, group: Group, packs: dict[tuple[str, ...], Pack], made: dict[Any, fx.Node]
    ) -> Fuser:
        return LoweredFuser(graph, group, self.inputs, packs, stacked=False, made=made)


def find_lowered(graph: fx.Graph, base: Collection[str], frozen: Collection[fx.Node]) -> list[Group]:
    """Return the groups of lowered layers with LoRA in ``graph`` that read one tensor.

    ``base`` has the placeholders of weights that may be packed. ``frozen`` has the nodes that are constant in a
    binding.
    """
    import adaptc.kernels  # noqa: F401  # makes torch know the ops

    dirty, kept = touched(graph)
    groups: dict[Any, Group] = {}
    for node in graph.find_nodes(op="call_function", target=ours.lora_linear.default):
        x, weight, bias, A, B, scale = node.args
        if weight.name not in base or not weight.meta["val"].is_contiguous() or node in kept or x in dirty:
            continue
        if not {n for n in (bias, A, B, scale) if n is not None} <= set(frozen) or not takes_slices(node, kept):
            continue
        kinds = (weight.meta["val"].dtype, A.meta["val"].dtype, scale.meta["val"].dtype, bias is None)
        group = groups.setdefault((x, *kinds), Group(x))
        if all(m.weight is not weight for m in group.members):
            group.members.append(Member(node))
    return [g for g in groups.values() if g.worth()]


class LoweredFuser(Fuser):
    """A writer of a group of :func:`find_lowered`."""

    def read(self) -> list[fx.Node]:
        return [n for m in self.group.members for n in m.linear.args[2:] if n is not None]  # type: ignore[misc]

    def write(self) -> None:
        from adaptc.kernels import sibling_table_of

        members, x = self.group.members, self.group.x
        widths = [m.width for m in members]
        A, B, scales = ([argument(m.linear, i) for m in members] for i in (3, 4, 5))
        bias = [] if members[0].bias is None else [self.cat([m.bias for m in members])]  # type: ignore[misc]
        y = self.call(aten.linear.default, x, self.weights(), *bias)
        h = self.call(ours.lora_down.default, x, self.cat(A))
        flat = [self.frozen(aten.reshape.default, self.frozen(aten.t.default, b), [-1]) for b in B]
        table = self.frozen(sibling_table_of, B)
        scale = self.frozen(aten.stack.default, scales)
        y = self.call(ours.lora_up_add_siblings.default, y, h, self.cat(flat), table, scale, widths)
        self.deal(y, widths)
