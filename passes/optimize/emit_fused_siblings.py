"""Write one group of siblings: the matmul of its layers, and what its adapters add.

The group comes from ``sibling_groups``. Afterwards its readers read slices of one matmul. The nodes that the group was
made of stay in the graph for a sweep. The forms are those of ``fuse_siblings``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adaptc.passes.graph.mutation import is_view
from adaptc.passes.optimize.fold_scales import above
from adaptc.passes.optimize.sibling_groups import Group, Member
from adaptc.passes.protocol.regions import node_tag

aten = torch.ops.aten

#: views that fail on the strides of a slice, and are replaced by reshapes
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Pack:
    """A new lifted input called ``name``: the weights behind the placeholders ``members``, stacked along their rows."""

    name: str
    members: tuple[str, ...]


@dataclass
class Fuser:
    """A writer of one group. ``packs`` and ``made`` hold the buffers and frozen values of earlier groups.

    It adds its own to both. ``stacked`` selects the form with blocks of zeros. ``wide`` computes the updates of
    adapters in half precision in float32.
    """

    graph: fx.Graph
    group: Group
    inputs: Collection[str]
    packs: dict[tuple[str, ...], Pack]
    stacked: bool
    wide: bool = False
    made: dict[Any, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = min(m.linear for m in self.group.members)
        lifted = [n for n in self.graph.find_nodes(op="placeholder") if n.name not in self.inputs]
        self.end = lifted[-1].next

    def run(self) -> None:
        """Write the group in front of its first layer, and move the nodes that it reads before it."""
        for node in self.read():
            above(self.first, node)
        with self.graph.inserting_before(self.first):
            self.write()

    def read(self) -> list[fx.Node]:
        """Return the nodes that the group reads beside its input and its weights."""
        found = [m.bias for m in self.group.members if m.bias is not None]
        return found + [n for u in self.group.updates for n in (u.down, u.up)]

    def write(self) -> None:
        """Write the matmul of the layers and the updates, and give each layer's readers their part."""
        group, members = self.group, self.group.members
        widths = [m.width for m in members]
        x = self._rows(group.x)
        bias = None if members[0].bias is None else self.cat([m.bias for m in members])  # type: ignore[misc]
        y = self.call(aten.linear.default, x, self.weights(), *([] if bias is None else [bias]))
        if group.updates:
            own, wide = self.dtypes
            low = x if own == wide else self.call(aten.to.dtype, x, wide)
            y = self._stacked(y, low, widths) if self.stacked or len(members) == 1 else self._apart(y, low, widths)
        self.deal(self._unrows(y, group.x, sum(widths)), widths)

    def deal(self, y: fx.Node, widths: Sequence[int]) -> None:
        """Give each layer's readers its columns of y."""
        for member, piece in zip(self.group.members, self._pieces(y, widths), strict=True):
            piece.meta["val"] = member.linear.meta["val"]
            if len(widths) > 1:
                _reshaped(member.result)
            member.result.replace_all_uses_with(piece)

    def _stacked(self, y: fx.Node, low: fx.Node, widths: Sequence[int]) -> fx.Node:
        down = self.cat([self._widened(u.down) for u in self.group.updates])
        ups = [self._up(m, w) for m, w in zip(self.group.members, widths, strict=True)]
        up = ups[0] if len(ups) == 1 else self.frozen(aten.block_diag.default, ups)
        return self._narrow(self._add(self._wide(y), low, down, up))

    def _up(self, member: Member, width: int) -> fx.Node:
        if member.update is not None:
            return self._widened(member.update.up)
        return self.frozen(aten.new_zeros.default, self._widened(self.group.updates[0].up), [width, 0])

    def _apart(self, y: fx.Node, low: fx.Node, widths: Sequence[int]) -> fx.Node:
        start = 0
        wide = self._wide(y)
        for member, width in zip(self.group.members, widths, strict=True):
            if member.update is not None:
                part = self.call(aten.slice.Tensor, wide, 1, start, start + width)
                self._add(part, low, self._widened(member.update.down), self._widened(member.update.up))
            start += width
        return self._narrow(wide)

    def _add(self, y: fx.Node, low: fx.Node, down: fx.Node, up: fx.Node) -> fx.Node:
        """Add low down^T up^T to ``y`` in place."""
        h = self.call(aten.mm.default, low, self._turned(down))
        return self.call(aten.addmm_.default, y, h, self._turned(up))

    def _turned(self, weight: fx.Node) -> fx.Node:
        """Return a frozen (N, K) as (K, N), so that a call can use ``mm``.

        For a thin matmul, ``linear`` spends half its time on inspecting its arguments.
        """
        turned = self.frozen(aten.t.default, weight)
        value = weight.meta["val"]
        if value.device.type != "cpu" or value.dtype.itemsize < 4:
            return turned
        # Transposed in memory, too, so that a row of x reads it in order. Matmuls in half precision repack it anyway.
        return self.frozen(aten.clone.default, turned, memory_format=torch.contiguous_format)

    def _widened(self, node: fx.Node) -> fx.Node:
        """Return a frozen value in the dtype that updates are computed in.

        A multiplication is made again from its widened factors, so that it lacks the rounding of the narrow dtype.
        """
        value, wide = node.meta["val"], self.dtypes[1]
        if value.dtype == wide:
            return node
        if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args):
            return self.frozen(aten.mul.Tensor, *(self._widened(a) for a in node.args))  # type: ignore[arg-type]
        return self.frozen(aten.to.dtype, node, wide)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def frozen(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node with a fake value, for hoisting to find, or the equal node that another group made.

        Sites may share a slot. Without reuse each of them would hold a copy of its value.
        """
        key = (target, repr(args), repr(kwargs))
        known = self.made.get(key)
        if known is not None:
            above(self.first, known)
            return known
        node = self.made[key] = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with torch.no_grad():
            node.meta["val"] = target(*values, **kwargs)
        return node

    def cat(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """Return the nodes concatenated as a frozen value; a single node stays as it is."""
        return nodes[0] if len(nodes) == 1 else self.frozen(aten.cat.default, list(nodes))

    def _rows(self, x: fx.Node) -> fx.Node:
        value = x.meta["val"]
        return x if value.ndim == 2 else self.call(aten.reshape.default, x, [-1, int(value.shape[-1])])

    def _unrows(self, y: fx.Node, x: fx.Node, width: int) -> fx.Node:
        value = x.meta["val"]
        if value.ndim == 2:
            return y
        return self.call(aten.view.default, y, [*(self._size(x, i) for i in range(value.ndim - 1)), width])

    def _size(self, x: fx.Node, axis: int) -> Any:
        """Return a size of ``x`` as an int or as the node that computes it, which is made if the graph has none."""
        size = x.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            # A size that an adapter's region computes may equal this one for this adapter, but not for the next.
            if str(node.meta.get("val")) == str(size) and node < self.first and node_tag(node) is None:
                return node
        node = self.call(aten.sym_size.int, x, axis)
        node.meta["val"] = size
        return node

    def weights(self) -> fx.Node:
        """Return the node of the group's weight: the one layer's, or an input with all weights concatenated."""
        members = self.group.members
        names = tuple(m.weight.name for m in members)
        if len(names) == 1:
            return members[0].weight
        name = f"packed_{len(self.packs)}"
        if names in self.packs:
            return next(n for n in self.graph.find_nodes(op="placeholder") if n.name == self.packs[names].name)
        with self.graph.inserting_before(self.end):
            node = self.graph.create_node("placeholder", name, name=name)
        node.target = node.name
        values = [m.weight.meta["val"].detach() for m in members]
        node.meta["val"] = torch.cat(values)
        self.packs[names] = Pack(node.name, names)
        return node

    def _pieces(self, y: fx.Node, widths: Sequence[int]) -> list[fx.Node]:
        if len(widths) == 1:
            return [y]
        parts = self.call(aten.split_with_sizes.default, y, list(widths), -1)
        return [self.call(operator.getitem, parts, i) for i in range(len(widths))]

    def _wide(self, y: fx.Node) -> fx.Node:
        """Return ``y`` in the dtype that updates are computed in."""
        dtype = self.dtypes[1]
        return y if dtype == self.dtypes[0] else self.call(aten.to.dtype, y, dtype)

    def _narrow(self, y: fx.Node) -> fx.Node:
        """Return ``y`` in the dtype of the layers."""
        return y if self.dtypes[1] == self.dtypes[0] else self.call(aten.to.dtype, y, self.dtypes[0])

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the layers and of the updates."""
        return self.group.x.meta["val"].dtype, self.group.computed(self.wide)


def _reshaped(value: fx.Node) -> None:
    """Replace the views that read ``value``, also through other views, by reshapes, which work on a slice."""
    todo, seen = [value], {value}
    while todo:
        for user in todo.pop().users:
            if user not in seen and is_view(user):
                seen.add(user)
                todo.append(user)
                if user.target in _VIEWS:
                    user.target = aten.reshape.default
