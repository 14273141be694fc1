"""Pack the adapters of lowered layers with LoRA once per binding, and fuse the layers that read the same input.

Takes a lowered graph, and its frozen nodes. Layers with LoRA that read the same rows x become one op:

    packed_lora(x, [W1; W2; W3], [A1; A2; A3], [B1, B2, B3], table, scales, widths)

The weights are one buffer, as in fuse_siblings. The factors are stacked and transposed once per binding, by hoisting. A
layer by itself becomes the same op, and its weight stays where it is. The op has kernels for few rows and for many, and
chooses in each call. No node has a rank: the table is made from the shapes of the factors, once per binding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.passes.graph.mutation import find_written_nodes
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.emit_fused_siblings import SiblingFuser, StackedWeight
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.passes.optimize.sibling_groups import GroupLayer, SiblingGroup, accepts_strided

aten, ours = torch.ops.aten, torch.ops.adaptc


@dataclass(frozen=True)
class LowerSiblings(FuseSiblings):
    """A pass that packs and fuses lowered layers, with options and data of its base; the count is that of all layers.

    ``stacked`` has no meaning here. Without ``shares`` each layer is packed by itself.
    """

    name: ClassVar[str] = "lower_siblings"

    shares: bool = True

    def find_groups_in(self, graph: fx.Graph) -> list[SiblingGroup]:
        stackable = self.stackable if self.shares else ()
        return find_lowered_groups(graph, stackable, stage_by_node(graph, self.stages))

    def make_fuser(
        self,
        graph: fx.Graph,
        group: SiblingGroup,
        packs: dict[tuple[str, ...], StackedWeight],
        made: dict[Any, fx.Node],
    ) -> SiblingFuser:
        return LoweredFuser(graph, group, self.user_inputs, packs, stacked=False, frozen_nodes=made)


def find_lowered_groups(graph: fx.Graph, base: Collection[str], frozen: Collection[fx.Node]) -> list[SiblingGroup]:
    """Return the groups of lowered layers with LoRA in ``graph``: siblings that read one tensor, and single layers.

    ``base`` has the placeholders of weights that may be stacked. ``frozen`` has the nodes that are constant in a
    binding. A layer whose adapter is not is in no group.
    """
    import adaptc.kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]  # makes torch know the ops

    dirty, kept = find_written_nodes(graph)
    groups: dict[Any, SiblingGroup] = {}
    for node in graph.find_nodes(op="call_function", target=ours.lora_linear.default):
        x, weight, bias, A, B, scale = node.args
        if not {n for n in (bias, A, B, scale) if n is not None} <= set(frozen):
            continue
        kinds = (weight.meta["val"].dtype, A.meta["val"].dtype, scale.meta["val"].dtype, bias is None)
        movable = weight.name in base and weight.meta["val"].is_contiguous()
        alone = not movable or node in kept or x in dirty or not accepts_strided(node, kept)
        group = groups.setdefault(node if alone else (x, *kinds), SiblingGroup(x))
        if all(m.weight is not weight for m in group.layers):
            group.layers.append(GroupLayer(node))
        else:
            groups[node] = SiblingGroup(x, [GroupLayer(node)])
    return list(groups.values())


class LoweredFuser(SiblingFuser):
    """A writer of a group of :func:`find_lowered_groups`."""

    def input_nodes(self) -> list[fx.Node]:
        return [n for m in self.group.layers for n in m.linear.args[2:] if n is not None]  # type: ignore[misc]

    def emit(self) -> None:
        from adaptc.kernels import sibling_table_op

        members, x = self.group.layers, self.group.x
        widths = [m.width for m in members]
        A, B, scales = ([argument(m.linear, i) for m in members] for i in (3, 4, 5))
        bias = None if members[0].bias is None else self._stack([m.bias for m in members])  # type: ignore[misc]
        flat = [self.add_frozen(aten.reshape.default, self.add_frozen(aten.t.default, b), [-1]) for b in B]
        table = None if len(members) == 1 else self.add_frozen(sibling_table_op, B)
        scale = self.add_frozen(aten.stack.default, scales)
        y = self.add_call(
            ours.packed_lora.default,
            *(x, self.weight_node(), bias, self._stack(A), self._stack(flat), table, scale, widths),
        )
        self.replace_outputs(y, widths)

    def _stack(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """Return the nodes concatenated as a frozen value, contiguous also where there is one."""
        return self.add_frozen(aten.cat.default, list(nodes))


@dataclass(frozen=True)
class CallKernelsDirectly(GraphPass):
    """A pass that lets an interpreter call packed layers without the dispatch of their op; the count is theirs."""

    name: ClassVar[str] = "call_kernels_directly"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        from adaptc.kernels import packed_lora_direct

        nodes = list(subject.find_nodes(op="call_function", target=ours.packed_lora.default))
        for node in nodes:
            node.target = packed_lora_direct
        return PassResult(subject, len(nodes))
