"""One product for all layers that read the same tensor, and one for the down projections of their adapters.

Before: a lifted graph, and its frozen placeholders (the base, and an adapter's slots where they are frozen). After: the
same values up to the order of a sum, from fewer and larger products. A *group* is what reads one tensor x: linear
layers with weights of the base, and what adapters add to them, linear(linear(x, A), B). A group becomes

    Y = linear(x, [W1; W2; W3])                 the weights one buffer, of which the parameters are views (``Pack``)
    H = linear(x, [A1; A2; A3])                 stacked once per binding, by hoisting
    Y.addmm_(H, blockdiag(B1, B2, B3))          up-projection and add in one step, for few rows
    Y[:, i].addmm_(linear(x, Ai), Bi)           the same without the blocks of zeros, for many

and each layer's output is a slice of Y. Layers whose outputs are returned, written to, or read by an op that asks for
strides are left alone. The ranks are in no node, so that every adapter runs through the same graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.ir.effects import is_view, sweep, touched
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.pass_infra import GraphPass, PassResult
from adaptc.passes.optimize.fold_scales import above
from adaptc.passes.optimize.hoist import stages_of

aten = torch.ops.aten

#: ops on a value whose strides may be those of a slice: the first are made to work, the second do not
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_STRIDED = (aten.as_strided.default, aten.view_as_real.default, aten.view_as_complex.default, aten.view.dtype)


@dataclass(frozen=True)
class Pack:
    """A new lifted input called ``name``: the weights behind the placeholders ``members``, one below the other."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a layer's output: ``out`` = y + linear(linear(low, down), up)."""

    low: fx.Node
    down: fx.Node
    up: fx.Node
    out: fx.Node


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

    def worth(self) -> bool:
        return len(self.members) > 1 or bool(self.updates)


@dataclass(frozen=True)
class FuseSiblings(GraphPass):
    """``packable``: the placeholders whose tensors may be moved into a buffer; ``stages``: the frozen ones, as
    :class:`~adaptc.passes.optimize.hoist.Hoist` takes them; ``inputs``: the user's. ``stacked``: with blocks of zeros,
    for few rows. ``data`` are the :class:`Pack`s, inputs that are new, in order behind the lifted ones; the count is
    that of the layers.
    """

    name: ClassVar[str] = "fuse_siblings"

    packable: Collection[str] = field(repr=False)
    stages: Sequence[Collection[str]] = field(repr=False)
    inputs: Collection[str] = field(repr=False)
    stacked: bool = False

    def groups(self, graph: fx.Graph) -> list[Group]:
        """What it would fuse in ``graph``, which stays as it is."""
        return find_groups(graph, self.packable, stages_of(graph, self.stages))

    def fuser(self, graph: fx.Graph, group: Group, packs: dict[tuple[str, ...], Pack]) -> Fuser:
        """What writes a group; ``packs``: those of the groups before it, which it adds to."""
        return Fuser(graph, group, self.inputs, packs, self.stacked)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        packs: dict[tuple[str, ...], Pack] = {}
        taken: dict[str, tuple[str, ...]] = {}
        count = 0
        for group in self.groups(subject):
            names = tuple(m.weight.name for m in group.members)
            if any(taken.get(n, names) != names for n in names):
                continue  # one of them is in the buffer of another group already
            if len(names) > 1:
                taken |= dict.fromkeys(names, names)
            self.fuser(subject, group, packs).run()
            count += len(names)
        sweep(subject)
        return PassResult(subject, count, data=tuple(packs.values()))


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


@dataclass
class Fuser:
    """Writes one group. ``packs``: those of the groups before it, which it adds to."""

    graph: fx.Graph
    group: Group
    inputs: Collection[str]
    packs: dict[tuple[str, ...], Pack]
    stacked: bool

    def __post_init__(self) -> None:
        self.first = min(m.linear for m in self.group.members)
        lifted = [n for n in self.graph.find_nodes(op="placeholder") if n.name not in self.inputs]
        self.end = lifted[-1].next

    def run(self) -> None:
        for node in self.read():
            above(self.first, node)
        with self.graph.inserting_before(self.first):
            self.write()

    def read(self) -> list[fx.Node]:
        """What the group reads beside its input and its weights."""
        found = [m.bias for m in self.group.members if m.bias is not None]
        return found + [n for u in self.group.updates for n in (u.low, u.down, u.up)]

    def write(self) -> None:
        group, members = self.group, self.group.members
        widths = [m.width for m in members]
        x = self._rows(group.x)
        bias = None if members[0].bias is None else self.cat([m.bias for m in members])  # type: ignore[misc]
        y = self.call(aten.linear.default, x, self.weights(), *([] if bias is None else [bias]))
        if group.updates:
            low = group.updates[0].low
            low = x if low is group.x else self._rows(low)
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
        down = self.cat([u.down for u in self.group.updates])
        ups = [self._up(m, w) for m, w in zip(self.group.members, widths, strict=True)]
        up = ups[0] if len(ups) == 1 else self.frozen(aten.block_diag.default, ups)
        wide = self._add(self._wide(y), self.call(aten.linear.default, low, down), up)
        return self._narrow(wide)

    def _up(self, member: Member, width: int) -> fx.Node:
        if member.update is not None:
            return member.update.up
        return self.frozen(aten.new_zeros.default, self.group.updates[0].up, [width, 0])

    def _apart(self, y: fx.Node, low: fx.Node, widths: Sequence[int]) -> fx.Node:
        start = 0
        wide = self._wide(y)
        for member, width in zip(self.group.members, widths, strict=True):
            if member.update is not None:
                part = self.call(aten.slice.Tensor, wide, 1, start, start + width)
                h = self.call(aten.linear.default, low, member.update.down)
                self._add(part, h, member.update.up)
            start += width
        return self._narrow(wide)

    def _add(self, y: fx.Node, h: fx.Node, up: fx.Node) -> fx.Node:
        return self.call(aten.addmm_.default, y, h, self.frozen(aten.t.default, up))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def frozen(self, target: Any, *args: Any) -> fx.Node:
        """A node that hoisting is to find, which needs its value."""
        node = self.call(target, *args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with torch.no_grad():
            node.meta["val"] = target(*values)
        return node

    def cat(self, nodes: Sequence[fx.Node]) -> fx.Node:
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
        """A size as a number, or as the node that computes it; one is made where there is none."""
        size = x.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            if str(node.meta.get("val")) == str(size) and node < self.first:
                return node
        node = self.call(aten.sym_size.int, x, axis)
        node.meta["val"] = size
        return node

    def weights(self) -> fx.Node:
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
        """``y`` in the dtype of the adapters."""
        dtype = self.dtypes[1]
        return y if dtype == self.dtypes[0] else self.call(aten.to.dtype, y, dtype)

    def _narrow(self, y: fx.Node) -> fx.Node:
        return y if self.dtypes[1] == self.dtypes[0] else self.call(aten.to.dtype, y, self.dtypes[0])

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the layers, and of their adapters."""
        own, updates = self.group.x.meta["val"].dtype, self.group.updates
        return own, updates[0].up.meta["val"].dtype if updates else own


def _reshaped(value: fx.Node) -> None:
    """Make the views that read ``value``, through views of it, work on a slice."""
    todo, seen = [value], {value}
    while todo:
        for user in todo.pop().users:
            if user not in seen and is_view(user):
                seen.add(user)
                todo.append(user)
                if user.target in _VIEWS:
                    user.target = aten.reshape.default
