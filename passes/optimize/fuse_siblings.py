"""Fuse layers that read the same tensor into one matmul, and the down projections of their adapters into another.

The input is a lifted graph and its frozen placeholders: the base, and an adapter's slots where they are frozen. The
values stay the same up to the order of a sum. A *group* is the linear layers with base weights that read one tensor x,
with what adapters add to them, linear(linear(x, A), B). A group becomes

    Y = linear(x, [W1; W2; W3]) the weights one buffer, of which the parameters are views (``StackedWeight``) H = mm(x,
    [A1; A2; A3]^T) stacked once per binding, by hoisting Y.addmm_(H, blockdiag(B1, B2, B3)^T) up-projection and add in
    one step, for few rows Y[:, i].addmm_(mm(x, Ai^T), Bi^T) the same without the blocks of zeros, for many rows

and each layer's output is a slice of Y. Layers whose outputs are returned, written to, or read by an op that asks for
strides are left alone. The ranks are in no node, so that every adapter runs through the same graph.

Adapters in half precision are added in float32 where ``in_float32`` asks for it, or where the processor cannot multiply
their dtype. Hoisting makes the float32 copies. Y and x are cast, and a scale that was folded is multiplied in after the
cast, which is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from adaptc.passes.graph.mutation import erase_dead_nodes
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.emit_fused_siblings import SiblingFuser, StackedWeight
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.passes.optimize.sibling_groups import SiblingGroup, find_groups


@dataclass(frozen=True)
class FuseSiblings(GraphPass):
    """A pass that fuses groups of layers. The count is that of the layers, and ``data`` is a tuple of
    :class:`StackedWeight`.

    ``stackable`` are the placeholders whose tensors may be moved into a buffer. ``stages`` are the frozen placeholders,
    as :class:`~adaptc.passes.optimize.hoist.Hoist` takes them, and ``user_inputs`` the user's. ``stacked`` uses
    up-projections with blocks of zeros, for few rows. ``in_float32`` computes adapters in half precision in float32,
    for the fewest rows. Each pack is a new input; they stand in order behind the lifted inputs.
    """

    name: ClassVar[str] = "fuse_siblings"

    stackable: Collection[str] = field(repr=False)
    stages: Sequence[Collection[str]] = field(repr=False)
    user_inputs: Collection[str] = field(repr=False)
    stacked: bool = False
    in_float32: bool = False

    def find_groups_in(self, graph: fx.Graph) -> list[SiblingGroup]:
        """Return the groups that the pass would fuse in ``graph``, which stays as it is."""
        return find_groups(graph, self.stackable, stage_by_node(graph, self.stages))

    def make_fuser(
        self,
        graph: fx.Graph,
        group: SiblingGroup,
        packs: dict[tuple[str, ...], StackedWeight],
        made: dict[Any, fx.Node],
    ) -> SiblingFuser:
        """Return the writer of a group; ``packs`` and ``made`` are those of the groups before it, to which it adds."""
        return SiblingFuser(graph, group, self.user_inputs, packs, self.stacked, self.in_float32, made)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        stacked_weights: dict[tuple[str, ...], StackedWeight] = {}
        frozen_nodes: dict[Any, fx.Node] = {}
        taken: dict[str, tuple[str, ...]] = {}
        count = 0
        for group in self.find_groups_in(subject):
            names = tuple(m.weight.name for m in group.layers)
            if any(taken.get(n, names) != names for n in names):
                continue  # a weight cannot be a view of two buffers, and another group's already holds one of these
            if len(names) > 1:
                taken |= dict.fromkeys(names, names)
            self.make_fuser(subject, group, stacked_weights, frozen_nodes).run()
            count += len(names)
        erase_dead_nodes(subject)
        return PassResult(subject, count, data=tuple(stacked_weights.values()))
