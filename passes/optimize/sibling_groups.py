"""Find groups of layers that can be fused, with what adapters add to each of them.

The input is a lifted graph and its frozen placeholders: the base, and an adapter's slots where they are frozen. The
graph is not changed. A *group* is the linear layers with base weights that read one tensor x, with the updates
linear(linear(x, A), B) that adapters add to them. Layers whose outputs are returned, written to, or read by an op that
asks for strides are in no group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.passes.graph.mutation import aliased_inputs, find_written_nodes
from adaptc.passes.graph.ops import argument
from adaptc.passes.protocol.matmul_op import onednn_supports

aten = torch.ops.aten

#: ops that depend on the strides of their input
_STRIDE_DEPENDENT_OPS = (
    aten.as_strided.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
    aten.view.dtype,
)


@dataclass(frozen=True)
class LoraUpdate:
    """An adapter's change of a layer's output: ``out`` = y + linear(linear(low, down), up)."""

    adapter_input: fx.Node
    down: fx.Node
    up: fx.Node
    output: fx.Node

    @property
    def rank(self) -> int:
        """Return the rank of the adapter."""
        return int(self.up.meta["val"].shape[1])


@dataclass(frozen=True)
class GroupLayer:
    """A layer of a group: its ``linear``, and the ``update`` that an adapter adds to its output, if one does."""

    linear: fx.Node
    update: LoraUpdate | None = None

    @property
    def output(self) -> fx.Node:
        """Return the node of the layer's output with its update."""
        return self.linear if self.update is None else self.update.output

    @property
    def width(self) -> int:
        """Return the size of the layer's output."""
        return int(self.linear.meta["val"].shape[-1])

    @property
    def weight(self) -> fx.Node:
        """Return the node of the layer's weight."""
        return argument(self.linear, 1)

    @property
    def bias(self) -> fx.Node | None:
        """Return the node of the layer's bias; None without one."""
        return argument(self.linear, 2)


@dataclass
class SiblingGroup:
    """The layers that read the tensor ``x``."""

    x: fx.Node
    layers: list[GroupLayer] = field(default_factory=list[GroupLayer])

    @property
    def updates(self) -> list[LoraUpdate]:
        """Return the updates of the members that have one."""
        return [m.update for m in self.layers if m.update is not None]

    @property
    def rows(self) -> Any:
        """Return the number of rows of x: the product of all its sizes but the last, an int or a symbolic size."""
        out: Any = 1
        for n in self.x.meta["val"].shape[:-1]:
            out = out * n
        return out

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Return the dtype of the updates; that of x where there are none."""
        return self.updates[0].up.meta["val"].dtype if self.updates else self.x.meta["val"].dtype

    @property
    def has_dtype_choice(self) -> bool:
        """Return whether there is a choice between half precision and float32 for the updates.

        There is one if the adapters are in half precision and the processor can multiply their dtype. Either is faster
        for some numbers of rows.
        """
        return self._is_half_on_cpu and onednn_supports(self.adapter_dtype)

    def compute_dtype(self, in_float32: bool = False) -> torch.dtype:
        """Return the dtype in which updates are computed; ``in_float32`` asks for float32 where there is a choice."""
        return (
            torch.float32
            if self._is_half_on_cpu and (in_float32 or not onednn_supports(self.adapter_dtype))
            else self.adapter_dtype
        )

    @property
    def _is_half_on_cpu(self) -> bool:
        half = bool(self.updates) and self.adapter_dtype.itemsize < 4
        return half and self.x.meta["val"].device.type == "cpu"

    def is_worth_fusing(self) -> bool:
        """Return whether fusing gains anything: the group has several members or an update."""
        return len(self.layers) > 1 or bool(self.updates)


def find_groups(graph: fx.Graph, base: Collection[str], frozen: Collection[fx.Node]) -> list[SiblingGroup]:
    """Return the groups of ``graph`` that can be fused, with their updates.

    ``base`` are the names of placeholders with base weights, and ``frozen`` the nodes that depend on frozen inputs
    alone.
    """
    dirty, written_or_returned = find_written_nodes(graph)
    groups: dict[Any, SiblingGroup] = {}
    for node in graph.nodes:
        # If x is written to, also through a view, the next layer may read other values.
        if not _is_layer(node, base, frozen) or node.args[0] in dirty:
            continue
        layer = _match_layer(node, frozen)
        if layer.output in written_or_returned:
            layer = GroupLayer(node)
        if node in written_or_returned or not accepts_strided(layer.output, written_or_returned):
            continue
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        key = (x, layer.weight.meta["val"].dtype, layer.bias is None)
        group = groups.setdefault(key, SiblingGroup(x))
        if any(m.weight is layer.weight for m in group.layers):
            continue
        if layer.update is None or all(u.adapter_input is layer.update.adapter_input for u in group.updates):
            group.layers.append(layer)
    return [g for g in groups.values() if g.is_worth_fusing()]


def _is_layer(node: fx.Node, base: Collection[str], frozen: Collection[fx.Node]) -> bool:
    """Return whether the node is a linear layer whose weight is a base weight, of the same dtype as its input."""
    if node.target is not aten.linear.default:
        return False
    x, weight, bias = (argument(node, i) for i in range(3))
    if weight.op != "placeholder" or weight.name not in base or x in frozen:
        return False
    if bias is not None and bias not in frozen:
        return False
    w, value = weight.meta["val"], x.meta.get("val")
    return w.ndim == 2 and isinstance(value, Tensor) and value.ndim > 1 and value.dtype == w.dtype and w.is_contiguous()


def _match_layer(node: fx.Node, frozen: Collection[fx.Node]) -> GroupLayer:
    """Return the layer with what is added to it: y + linear(linear(x, A), B), cast to y's dtype if the sum is wider."""
    plain = GroupLayer(node)
    if len(node.users) != 1:
        return plain
    (sum_node,) = node.users
    if sum_node.target is not aten.add.Tensor or argument(sum_node, 2) != 1:
        return plain
    up = _match_projection(sum_node.args[1] if sum_node.args[0] is node else sum_node.args[0], frozen)
    down = None if up is None else _match_projection(up.args[0], frozen)
    if up is None or down is None:
        return plain
    x, y = node.args[0], node.meta["val"]
    adapter_input, down, up = down.args[0], argument(down, 1), argument(up, 1)
    assert isinstance(adapter_input, fx.Node)
    if adapter_input is x:
        return (
            GroupLayer(node, LoraUpdate(adapter_input, down, up, sum_node))
            if sum_node.meta["val"].dtype == y.dtype
            else plain
        )
    # Adapters of half-precision layers may be float32: x is cast before the adapter, and the sum after it.
    casts = [u for u in sum_node.users if u.target is aten.to.dtype and u.args[1] == y.dtype]
    if (
        adapter_input.target is not aten.to.dtype
        or adapter_input.args[0] is not x
        or len(sum_node.users) != 1
        or not casts
    ):
        return plain
    if sum_node.meta["val"].dtype != up.meta["val"].dtype:  # the sum has a wider dtype than its two terms
        return plain
    return GroupLayer(node, LoraUpdate(adapter_input, down, up, casts[0]))


def _match_projection(node: Any, frozen: Collection[fx.Node]) -> fx.Node | None:
    """Return the node if it is a matmul with a frozen matrix and has one user; else None."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    x, weight, bias = (argument(node, i) for i in range(3))
    fits = bias is None and weight in frozen and x not in frozen and weight.meta["val"].ndim == 2
    return node if fits else None


def accepts_strided(value: fx.Node, written_or_returned: Collection[fx.Node]) -> bool:
    """Return whether all readers of ``value`` accept memory that is not contiguous, once views are reshapes."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        if node in written_or_returned:
            return False
        for user in node.users:
            if (
                user.target in _STRIDE_DEPENDENT_OPS
                or user.op != "call_function"
                or not hasattr(user.target, "_schema")
            ):
                return False
            if user not in seen and node in aliased_inputs(user) and user.target is not aten.contiguous.default:
                seen.add(user)
                todo.append(user)
    return True
