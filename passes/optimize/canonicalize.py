"""Remove from a lifted graph what provably does nothing, and compute equal things once.

Before: any exported graph whose nodes have fake values. After: the same values, bit for bit, from fewer operators. A
captured transformer checks the dtype of every cast, casts float32 to float32, slices whole axes and unsqueezes the same
rotary angles in each layer: half of what an interpreter dispatches for one token.

Left alone: whatever draws random numbers, is written to, or shares memory with something that is; what the program
returns, so that no two outputs become one tensor; and the checks of the user's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.ir.effects import is_metadata_assert, pure, sweep, touched
from adaptc.passes.ir.modes import mode_of
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.pass_infra import GraphPass, PassResult

aten = torch.ops.aten

#: one past the greatest end a slice can have
_END = 2**63 - 1


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """``inputs`` are the names of the user's placeholders. ``differentiable``: gradients flow through the graph, so
    that a ``detach`` means something. ``autocast``: the graph may run under it, so that a cast of what it computes
    means something, whatever type that had at capture. The count is that of the nodes that went."""

    name: ClassVar[str] = "canonicalize"

    inputs: Collection[str] = field(repr=False)
    differentiable: bool = False
    autocast: bool = False

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        before = len(subject.nodes)
        dirty, kept = touched(subject)
        known: dict[Any, fx.Node] = {}
        for node in list(subject.nodes):
            if node.op != "call_function":
                continue
            if is_metadata_assert(node):
                if node.args[0].name not in self.inputs and _holds(node):  # type: ignore[union-attr]
                    subject.erase_node(node)
                continue
            if node in kept:
                continue
            source = _nothing(node, self.inputs, self.differentiable)
            if source is not None and self.autocast and _casts(node) and _computed(source):
                source = None
            if source is None and dirty.isdisjoint(node.all_input_nodes):
                source = _seen(node, known)
            if source is not None and source not in kept:
                node.replace_all_uses_with(source)
                subject.erase_node(node)
        sweep(subject)
        return PassResult(subject, before - len(subject.nodes))


def _holds(node: fx.Node) -> bool:
    """Whether the fake value already says that a check of metadata passes."""
    value = node.args[0].meta.get("val")  # type: ignore[union-attr]
    return isinstance(value, Tensor) and all(
        argument(node, i) is None or argument(node, i) == getattr(value, name)
        for i, name in ((3, "dtype"), (4, "device"), (5, "layout"))
    )


def _seen(node: fx.Node, known: dict[Any, fx.Node]) -> fx.Node | None:
    """An earlier node that computes the same of the same."""
    if not pure(node) or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return None
    found = known.setdefault((node.target, _key(node.args), _key(dict(node.kwargs))), node)
    return None if found is node else found


def _key(value: Any) -> Any:
    """Equal for arguments that mean the same: 1, 1.0 and True are equal numbers of three kinds."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple((k, _key(value[k])) for k in sorted(value))
    return (type(value), value) if not isinstance(value, slice) else str(value)


def _nothing(node: fx.Node, inputs: Collection[str], differentiable: bool) -> fx.Node | None:
    """The argument that the node hands on as it is."""
    rule = _RULES.get(node.target)
    source = node.args[0] if node.args else None
    if rule is None or not isinstance(source, fx.Node):
        return None
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None
    if node.target in _MOVES and source.name in inputs:
        return None  # the user's tensor may be on another device than the one the program was captured with
    if node.target is aten.detach.default and differentiable:
        return None
    same = (old.dtype, old.device) == (new.dtype, new.device) and _sizes(old) == _sizes(new)
    return source if same and rule(node) else None


def _sizes(value: Tensor) -> tuple[str, ...]:
    return tuple(map(str, value.shape))


def _always(node: fx.Node) -> bool:
    return True


def _not_copied(node: fx.Node) -> bool:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
    layout = argument(node, names.index("memory_format"))
    return not argument(node, names.index("copy")) and layout in (None, torch.preserve_format)


def _whole(node: fx.Node) -> bool:
    start, end, step = (argument(node, i) for i in (2, 3, 4))
    return start in (None, 0) and step == 1 and (end is None or end == _END)


def _by_one(node: fx.Node) -> bool:
    # A tensor times 1.0 may still change from an integer to a float, which the dtypes tell.
    return isinstance(node.args[1], (int, float)) and node.args[1] == 1


def _off(node: fx.Node) -> bool:
    return not mode_of(node)


def _casts(node: fx.Node) -> bool:
    """Whether the node names the type of its value."""
    position = _CASTS.get(node.target)
    return position is not None and argument(node, position) is not None


def _computed(node: fx.Node) -> bool:
    """Whether autocast may change the type of a value."""
    return node.op == "call_function" and not _casts(node) and node.meta["val"].is_floating_point()


#: op -> where the type stands among its arguments
_CASTS: dict[Any, int] = {aten.to.dtype: 1, aten.to.dtype_layout: 1, aten.to.device: 2}
_MOVES = {aten.to.dtype_layout, aten.to.device}
#: op -> when it hands its first argument on, given that sizes, dtype and device stay
_RULES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.to.dtype: _not_copied,
    aten.to.dtype_layout: _not_copied,
    aten.to.device: _not_copied,
    aten.slice.Tensor: _whole,
    aten.expand.default: _always,
    aten.view.default: _always,
    aten.reshape.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.mul.Tensor: _by_one,
    aten.div.Tensor: _by_one,
    aten.dropout.default: _off,
    aten.feature_dropout.default: _off,
}
