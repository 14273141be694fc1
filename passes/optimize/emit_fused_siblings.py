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
from adaptc.passes.optimize.fold_scales import move_before
from adaptc.passes.optimize.sibling_groups import GroupLayer, SiblingGroup
from adaptc.passes.protocol.regions import node_tag

aten = torch.ops.aten

#: views that fail on the strides of a slice, and are replaced by reshapes
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class StackedWeight:
    """A new lifted input called ``name``: the weights behind the placeholders ``members``, stacked along their rows."""

    name: str
    parameter_names: tuple[str, ...]


@dataclass
class SiblingFuser:
    """A writer of one group. ``stacked_weights`` and ``frozen_nodes`` hold the buffers and frozen values of earlier
    groups.

    It adds its own to both. ``stacked`` selects the form with blocks of zeros. ``wide`` computes the updates of
    adapters in half precision in float32.
    """

    graph: fx.Graph
    group: SiblingGroup
    user_inputs: Collection[str]
    stacked_weights: dict[tuple[str, ...], StackedWeight]
    stacked: bool
    in_float32: bool = False
    frozen_nodes: dict[Any, fx.Node] = field(default_factory=dict[Any, fx.Node])

    def __post_init__(self) -> None:
        self.first_layer = min(m.linear for m in self.group.layers)
        lifted = [n for n in self.graph.find_nodes(op="placeholder") if n.name not in self.user_inputs]
        self.after_lifted = lifted[-1].next

    def run(self) -> None:
        """Write the group in front of its first layer, and move the nodes that it reads before it."""
        for node in self.input_nodes():
            move_before(self.first_layer, node)
        with self.graph.inserting_before(self.first_layer):
            self.emit()

    def input_nodes(self) -> list[fx.Node]:
        """Return the nodes that the group reads beside its input and its weights."""
        found = [m.bias for m in self.group.layers if m.bias is not None]
        return found + [n for u in self.group.updates for n in (u.down, u.up)]

    def emit(self) -> None:
        """Write the matmul of the layers and the updates, and give each layer's readers their part."""
        group, members = self.group, self.group.layers
        widths = [m.width for m in members]
        x = self._flatten_rows(group.x)
        bias = None if members[0].bias is None else self.cat([m.bias for m in members])  # type: ignore[misc]
        y = self.add_call(aten.linear.default, x, self.weight_node(), *([] if bias is None else [bias]))
        if group.updates:
            own, wide = self.dtypes
            low = x if own == wide else self.add_call(aten.to.dtype, x, wide)
            y = (
                self._add_stacked(y, low, widths)
                if self.stacked or len(members) == 1
                else self._add_separately(y, low, widths)
            )
        self.replace_outputs(self._restore_axes(y, group.x, sum(widths)), widths)

    def replace_outputs(self, y: fx.Node, widths: Sequence[int]) -> None:
        """Give each layer's readers its columns of y."""
        for member, piece in zip(self.group.layers, self._split_columns(y, widths), strict=True):
            piece.meta["val"] = member.linear.meta["val"]
            if len(widths) > 1:
                _reshape_views(member.output)
            member.output.replace_all_uses_with(piece)

    def _add_stacked(self, y: fx.Node, low: fx.Node, widths: Sequence[int]) -> fx.Node:
        down = self.cat([self._in_update_dtype(u.down) for u in self.group.updates])
        ups = [self._up_projection(m, w) for m, w in zip(self.group.layers, widths, strict=True)]
        up = ups[0] if len(ups) == 1 else self.add_frozen(aten.block_diag.default, ups)
        return self._to_layer_dtype(self._add(self._to_update_dtype(y), low, down, up))

    def _up_projection(self, member: GroupLayer, width: int) -> fx.Node:
        if member.update is not None:
            return self._in_update_dtype(member.update.up)
        return self.add_frozen(aten.new_zeros.default, self._in_update_dtype(self.group.updates[0].up), [width, 0])

    def _add_separately(self, y: fx.Node, low: fx.Node, widths: Sequence[int]) -> fx.Node:
        start = 0
        wide = self._to_update_dtype(y)
        for member, width in zip(self.group.layers, widths, strict=True):
            if member.update is not None:
                part = self.add_call(aten.slice.Tensor, wide, 1, start, start + width)
                self._add(part, low, self._in_update_dtype(member.update.down), self._in_update_dtype(member.update.up))
            start += width
        return self._to_layer_dtype(wide)

    def _add(self, y: fx.Node, low: fx.Node, down: fx.Node, up: fx.Node) -> fx.Node:
        """Add low down^T up^T to ``y`` in place."""
        h = self.add_call(aten.mm.default, low, self._transposed(down))
        return self.add_call(aten.addmm_.default, y, h, self._transposed(up))

    def _transposed(self, weight: fx.Node) -> fx.Node:
        """Return a frozen (N, K) as (K, N), so that a call can use ``mm``.

        For a thin matmul, ``linear`` spends half its time on inspecting its arguments.
        """
        turned = self.add_frozen(aten.t.default, weight)
        value = weight.meta["val"]
        if value.device.type != "cpu" or value.dtype.itemsize < 4:
            return turned
        # Transposed in memory, too, so that a row of x reads it in order. Matmuls in half precision repack it anyway.
        return self.add_frozen(aten.clone.default, turned, memory_format=torch.contiguous_format)

    def _in_update_dtype(self, node: fx.Node) -> fx.Node:
        """Return a frozen value in the dtype that updates are computed in.

        A multiplication is made again from its widened factors, so that it lacks the rounding of the narrow dtype.
        """
        value, wide = node.meta["val"], self.dtypes[1]
        if value.dtype == wide:
            return node
        if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args):
            return self.add_frozen(aten.mul.Tensor, *(self._in_update_dtype(a) for a in node.args))  # type: ignore[arg-type]
        return self.add_frozen(aten.to.dtype, node, wide)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def add_call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def add_frozen(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node with a fake value, for hoisting to find, or the equal node that another group made.

        Sites may share a slot. Without reuse each of them would hold a copy of its value.
        """
        key = (target, repr(args), repr(kwargs))
        known = self.frozen_nodes.get(key)
        if known is not None:
            move_before(self.first_layer, known)
            return known
        node = self.frozen_nodes[key] = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with torch.no_grad():
            node.meta["val"] = target(*values, **kwargs)
        return node

    def cat(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """Return the nodes concatenated as a frozen value; a single node stays as it is."""
        return nodes[0] if len(nodes) == 1 else self.add_frozen(aten.cat.default, list(nodes))

    def _flatten_rows(self, x: fx.Node) -> fx.Node:
        value = x.meta["val"]
        return x if value.ndim == 2 else self.add_call(aten.reshape.default, x, [-1, int(value.shape[-1])])

    def _restore_axes(self, y: fx.Node, x: fx.Node, width: int) -> fx.Node:
        value = x.meta["val"]
        if value.ndim == 2:
            return y
        return self.add_call(aten.view.default, y, [*(self._size(x, i) for i in range(value.ndim - 1)), width])

    def _size(self, x: fx.Node, axis: int) -> Any:
        """Return a size of ``x`` as an int or as the node that computes it, which is made if the graph has none."""
        size = x.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            # A size that an adapter's region computes may equal this one for this adapter, but not for the next.
            if str(node.meta.get("val")) == str(size) and node < self.first_layer and node_tag(node) is None:
                return node
        node = self.add_call(aten.sym_size.int, x, axis)
        node.meta["val"] = size
        return node

    def weight_node(self) -> fx.Node:
        """Return the node of the group's weight: the one layer's, or an input with all weights concatenated."""
        members = self.group.layers
        names = tuple(m.weight.name for m in members)
        if len(names) == 1:
            return members[0].weight
        name = f"packed_{len(self.stacked_weights)}"
        if names in self.stacked_weights:
            return next(
                n for n in self.graph.find_nodes(op="placeholder") if n.name == self.stacked_weights[names].name
            )
        with self.graph.inserting_before(self.after_lifted):
            node = self.graph.create_node("placeholder", name, name=name)
        node.target = node.name
        values = [m.weight.meta["val"].detach() for m in members]
        node.meta["val"] = torch.cat(values)
        self.stacked_weights[names] = StackedWeight(node.name, names)
        return node

    def _split_columns(self, y: fx.Node, widths: Sequence[int]) -> list[fx.Node]:
        if len(widths) == 1:
            return [y]
        parts = self.add_call(aten.split_with_sizes.default, y, list(widths), -1)
        return [self.add_call(operator.getitem, parts, i) for i in range(len(widths))]

    def _to_update_dtype(self, y: fx.Node) -> fx.Node:
        """Return ``y`` in the dtype that updates are computed in."""
        dtype = self.dtypes[1]
        return y if dtype == self.dtypes[0] else self.add_call(aten.to.dtype, y, dtype)

    def _to_layer_dtype(self, y: fx.Node) -> fx.Node:
        """Return ``y`` in the dtype of the layers."""
        return y if self.dtypes[1] == self.dtypes[0] else self.add_call(aten.to.dtype, y, self.dtypes[0])

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the layers and of the updates."""
        return self.group.x.meta["val"].dtype, self.group.compute_dtype(self.in_float32)


def _reshape_views(value: fx.Node) -> None:
    """Replace the views that read ``value``, also through other views, by reshapes, which work on a slice."""
    todo, seen = [value], {value}
    while todo:
        for user in todo.pop().users:
            if user not in seen and is_view(user):
                seen.add(user)
                todo.append(user)
                if user.target in _VIEWS:
                    user.target = aten.reshape.default
