"""What can be fused: layers that read one tensor, with what adapters add to each of them.

Before: a lifted graph, and its frozen placeholders (the base, and an adapter's slots where they are frozen). After: the
same graph, and its *groups*: what reads one tensor x, linear layers with weights of the base, and the updates
linear(linear(x, A), B) that adapters add to them. Layers whose outputs are returned, written to, or read by an op that
asks for strides are in no group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.passes.ir.effects import is_view, touched
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.product import takes

aten = torch.ops.aten

#: ops that ask for strides
_STRIDED = (aten.as_strided.default, aten.view_as_real.default, aten.view_as_complex.default, aten.view.dtype)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a layer's output: ``out`` = y + linear(linear(low, down), up)."""

    low: fx.Node
    down: fx.Node
    up: fx.Node
    out: fx.Node

    @property
    def rank(self) -> int:
        return int(self.up.meta["val"].shape[1])


@dataclass(frozen=True)
class Member:
    """One layer of a group: its ``linear``, and the ``update`` an adapter adds to its output, if it does."""

    linear: fx.Node
    update: Update | None = None

    @property
    def result(self) -> fx.Node:
        return self.linear if self.update is None else self.update.out

    @property
    def width(self) -> int:
        return int(self.linear.meta["val"].shape[-1])

    @property
    def weight(self) -> fx.Node:
        return argument(self.linear, 1)

    @property
    def bias(self) -> fx.Node | None:
        return argument(self.linear, 2)


@dataclass
class Group:
    """What reads ``x``."""

    x: fx.Node
    members: list[Member] = field(default_factory=list)

    @property
    def updates(self) -> list[Update]:
        return [m.update for m in self.members if m.update is not None]

    @property
    def rows(self) -> Any:
        """How many rows x has, as the product of its sizes."""
        out: Any = 1
        for n in self.x.meta["val"].shape[:-1]:
            out = out * n
        return out

    @property
    def adapters(self) -> torch.dtype:
        """The type of what adapters add; that of x where none do."""
        return self.updates[0].up.meta["val"].dtype if self.updates else self.x.meta["val"].dtype

    @property
    def narrow(self) -> bool:
        """Whether adapters in half precision may be computed as they are, and in float32 too: both have their rows on a
        processor that multiplies their type."""
        return self._half_on_cpu and takes(self.adapters)

    def computed(self, wide: bool = False) -> torch.dtype:
        """The type that updates are computed in; ``wide``: in float32 where it may be."""
        return torch.float32 if self._half_on_cpu and (wide or not takes(self.adapters)) else self.adapters

    @property
    def _half_on_cpu(self) -> bool:
        half = bool(self.updates) and self.adapters.itemsize < 4
        return half and self.x.meta["val"].device.type == "cpu"

    def worth(self) -> bool:
        return len(self.members) > 1 or bool(self.updates)


def find_groups(graph: fx.Graph, base: Collection[str], frozen: Collection[fx.Node]) -> list[Group]:
    """The groups of ``graph`` that can be fused, with what adapters add."""
    dirty, kept = touched(graph)
    groups: dict[Any, Group] = {}
    for node in graph.nodes:
        # An input that is written to, through a view of it too, may be another one for the next layer.
        if not _is_layer(node, base, frozen) or node.args[0] in dirty:
            continue
        member = _with_update(node, frozen)
        if member.result in kept:
            member = Member(node)
        if node in kept or not takes_slices(member.result, kept):
            continue
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        key = (x, member.weight.meta["val"].dtype, member.bias is None)
        group = groups.setdefault(key, Group(x))
        if any(m.weight is member.weight for m in group.members):
            continue
        if member.update is None or all(u.low is member.update.low for u in group.updates):
            group.members.append(member)
    return [g for g in groups.values() if g.worth()]


def _is_layer(node: fx.Node, base: Collection[str], frozen: Collection[fx.Node]) -> bool:
    if node.target is not aten.linear.default:
        return False
    x, weight, bias = (argument(node, i) for i in range(3))
    if weight.op != "placeholder" or weight.name not in base or x in frozen:
        return False
    if bias is not None and bias not in frozen:
        return False
    w, value = weight.meta["val"], x.meta.get("val")
    return w.ndim == 2 and isinstance(value, Tensor) and value.ndim > 1 and value.dtype == w.dtype and w.is_contiguous()


def _with_update(node: fx.Node, frozen: Collection[fx.Node]) -> Member:
    """The layer with what is added to it: y + linear(linear(x, A), B), cast back to the dtype of y if it was wider."""
    plain = Member(node)
    if len(node.users) != 1:
        return plain
    (total,) = node.users
    if total.target is not aten.add.Tensor or argument(total, 2) != 1:
        return plain
    up = _projection(total.args[1] if total.args[0] is node else total.args[0], frozen)
    down = None if up is None else _projection(up.args[0], frozen)
    if up is None or down is None:
        return plain
    x, y = node.args[0], node.meta["val"]
    low, down, up = down.args[0], argument(down, 1), argument(up, 1)
    assert isinstance(low, fx.Node)
    if low is x:
        return Member(node, Update(low, down, up, total)) if total.meta["val"].dtype == y.dtype else plain
    # Adapters of half-precision layers are float32: x is cast on the way in, the sum on the way out.
    casts = [u for u in total.users if u.target is aten.to.dtype and u.args[1] == y.dtype]
    if low.target is not aten.to.dtype or low.args[0] is not x or len(total.users) != 1 or not casts:
        return plain
    if total.meta["val"].dtype != up.meta["val"].dtype:  # the sum is taken in a type that is wider than both
        return plain
    return Member(node, Update(low, down, up, casts[0]))


def _projection(node: Any, frozen: Collection[fx.Node]) -> fx.Node | None:
    """The node, if it is a product with a frozen matrix that nothing else reads."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    x, weight, bias = (argument(node, i) for i in range(3))
    fits = bias is None and weight in frozen and x not in frozen and weight.meta["val"].ndim == 2
    return node if fits else None


def takes_slices(value: fx.Node, kept: Collection[fx.Node]) -> bool:
    """Whether all that reads ``value`` works on memory that is not contiguous, once its views are reshapes."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        if node in kept:
            return False
        for user in node.users:
            if user.target in _STRIDED or user.op != "call_function" or not hasattr(user.target, "_schema"):
                return False
            if user not in seen and is_view(user):
                seen.add(user)
                todo.append(user)
    return True
