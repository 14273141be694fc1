"""One product for all layers that read the same tensor, and one for the down projections of their adapters.

Before: a lifted graph, and its frozen placeholders (the base, and an adapter's slots where they are frozen). After: the
same values up to the order of a sum, from fewer and larger products. A *group* is what reads one tensor x: linear
layers with weights of the base, and what adapters add to them, linear(linear(x, A), B). A group becomes

    Y = linear(x, [W1; W2; W3])                 the weights one buffer, of which the parameters are views (``Pack``)
    H = mm(x, [A1; A2; A3]^T)                   stacked once per binding, by hoisting
    Y.addmm_(H, blockdiag(B1, B2, B3)^T)        up-projection and add in one step, for few rows
    Y[:, i].addmm_(mm(x, Ai^T), Bi^T)           the same without the blocks of zeros, for many

and each layer's output is a slice of Y. Layers whose outputs are returned, written to, or read by an op that asks for
strides are left alone. The ranks are in no node, so that every adapter runs through the same graph.

Adapters in half precision are added in float32, of copies that hoisting makes, where ``wide`` asks for it or the
processor does not multiply their type: Y and x are cast, and a scale that was folded is multiplied in after the cast,
which is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from adaptc.passes.ir.effects import sweep
from adaptc.passes.ir.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.hoist import stages_of
from adaptc.passes.optimize.sibling_groups import Group, find_groups
from adaptc.passes.optimize.write_siblings import Fuser, Pack


@dataclass(frozen=True)
class FuseSiblings(GraphPass):
    """``packable``: the placeholders whose tensors may be moved into a buffer; ``stages``: the frozen ones, as
    :class:`~adaptc.passes.optimize.hoist.Hoist` takes them; ``inputs``: the user's. ``stacked``: with blocks of zeros,
    for few rows; ``wide``: adapters in half precision in float32, for the fewest. ``data`` are the :class:`Pack`s,
    inputs that are new, in order behind the lifted ones; the count is that of the layers.
    """

    name: ClassVar[str] = "fuse_siblings"

    packable: Collection[str] = field(repr=False)
    stages: Sequence[Collection[str]] = field(repr=False)
    inputs: Collection[str] = field(repr=False)
    stacked: bool = False
    wide: bool = False

    def groups(self, graph: fx.Graph) -> list[Group]:
        """What it would fuse in ``graph``, which stays as it is."""
        return find_groups(graph, self.packable, stages_of(graph, self.stages))

    def fuser(
        self, graph: fx.Graph, group: Group, packs: dict[tuple[str, ...], Pack], made: dict[Any, fx.Node]
    ) -> Fuser:
        """What writes a group; ``packs`` and ``made``: those of the groups before it, which it adds to."""
        return Fuser(graph, group, self.inputs, packs, self.stacked, self.wide, made)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        packs: dict[tuple[str, ...], Pack] = {}
        made: dict[Any, fx.Node] = {}
        taken: dict[str, tuple[str, ...]] = {}
        count = 0
        for group in self.groups(subject):
            names = tuple(m.weight.name for m in group.members)
            if any(taken.get(n, names) != names for n in names):
                continue  # one of them is in the buffer of another group already
            if len(names) > 1:
                taken |= dict.fromkeys(names, names)
            self.fuser(subject, group, packs, made).run()
            count += len(names)
        sweep(subject)
        return PassResult(subject, count, data=tuple(packs.values()))
