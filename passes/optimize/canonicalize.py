"""Remove operators that provably do nothing from a lifted graph, and compute equal values once.

The nodes must have fake values. The graph's values stay the same, bit for bit. A captured transformer checks the dtype
of every cast, casts float32 to float32, slices whole axes and unsqueezes the same rotary angles in each layer. These
are half of the operators that an interpreter runs for one token.

Some nodes are left alone. They draw random numbers, are written to, or share memory with a node that is. Others are
returned by the program, so that no two outputs become one tensor. The checks of the user's own inputs stay, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from adaptc.passes.graph.mutation import erase_dead_nodes, find_written_nodes, is_metadata_assert, is_pure
from adaptc.passes.graph.ops import argument, schema_of
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.graph.train_eval import training_mode_of
from adaptc.torch_typing import is_list_or_tuple, is_mapping

aten = torch.ops.aten

#: the end of a slice that goes to the end of its axis
_AXIS_END = 2**63 - 1


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """A pass that removes operators without effect and repeated ones. The count is that of the removed nodes.

    ``user_inputs`` are the names of the user's placeholders. ``differentiable`` says that gradients flow through the
    graph, so that a ``detach`` has an effect. ``autocast`` says that the graph may run under autocast, which may change
    the dtype of a computed value. A cast of such a value then has an effect, whatever its dtype at capture.
    """

    name: ClassVar[str] = "canonicalize"

    user_inputs: Collection[str] = field(repr=False)
    differentiable: bool = False
    autocast: bool = False

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        node_count = len(subject.nodes)
        dirty, written_or_returned = find_written_nodes(subject)
        nodes_by_key: dict[Any, fx.Node] = {}
        for node in list(subject.nodes):
            if node.op != "call_function":
                continue
            if is_metadata_assert(node):
                if node.args[0].name not in self.user_inputs and _is_proven_check(node):  # type: ignore[union-attr]
                    subject.erase_node(node)
                continue
            if node in written_or_returned:
                continue
            source = _unchanged_argument(node, self.user_inputs, self.differentiable)
            if source is not None and self.autocast and _names_dtype(node) and _may_autocast(source):
                source = None
            if source is None and dirty.isdisjoint(node.all_input_nodes):
                source = _earlier_equal(node, nodes_by_key)
            if source is not None and source not in written_or_returned:
                node.replace_all_uses_with(source)
                subject.erase_node(node)
        erase_dead_nodes(subject)
        return PassResult(subject, node_count - len(subject.nodes))


def _is_proven_check(node: fx.Node) -> bool:
    """Return whether the fake value already proves that a check of metadata passes."""
    value = node.args[0].meta.get("val")  # type: ignore[union-attr]
    return isinstance(value, Tensor) and all(
        argument(node, i) is None or argument(node, i) == getattr(value, name)
        for i, name in ((3, "dtype"), (4, "device"), (5, "layout"))
    )


def _earlier_equal(node: fx.Node, nodes_by_key: dict[Any, fx.Node]) -> fx.Node | None:
    """Return an earlier node that computes the same from the same arguments; None without one."""
    if not is_pure(node) or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return None
    found = nodes_by_key.setdefault((node.target, _key(node.args), _key(dict(node.kwargs))), node)
    return None if found is node else found


def _key(value: Any) -> Any:
    """Return a key that tells arguments of different types apart: 1, 1.0 and True are equal in Python."""
    if is_list_or_tuple(value):
        return tuple(map(_key, value))
    if is_mapping(value):
        return tuple((k, _key(value[k])) for k in sorted(value))
    return (type(value), value) if not isinstance(value, slice) else str(cast(Any, value))


def _unchanged_argument(node: fx.Node, user_inputs: Collection[str], differentiable: bool) -> fx.Node | None:
    """Return the argument that the node returns unchanged; None for all other nodes."""
    rule = _NO_OP_CONDITIONS.get(node.target)
    source = node.args[0] if node.args else None
    if rule is None or not isinstance(source, fx.Node):
        return None
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None
    if node.target in _DEVICE_OPS and source.name in user_inputs:
        return None  # the user's tensor may be on another device than the tensor at capture
    if node.target is aten.detach.default and differentiable:
        return None
    same = (old.dtype, old.device) == (new.dtype, new.device) and _sizes(old) == _sizes(new)
    return source if same and rule(node) else None


def _sizes(value: Tensor) -> tuple[str, ...]:
    return tuple(map(str, value.shape))


def _always(node: fx.Node) -> bool:
    return True


def _does_not_copy(node: fx.Node) -> bool:
    names = [a.name for a in schema_of(node.target).arguments]
    layout = argument(node, names.index("memory_format"))
    return not argument(node, names.index("copy")) and layout in (None, torch.preserve_format)


def _takes_whole_axis(node: fx.Node) -> bool:
    start, end, step = (argument(node, i) for i in (2, 3, 4))
    return start in (None, 0) and step == 1 and (end is None or end == _AXIS_END)


def _operand_is_one(node: fx.Node) -> bool:
    # An integer tensor times 1.0 becomes a float; the caller excludes that case by comparing dtypes.
    return isinstance(node.args[1], (int, float)) and node.args[1] == 1


def _is_in_eval_mode(node: fx.Node) -> bool:
    return not training_mode_of(node)


def _names_dtype(node: fx.Node) -> bool:
    """Return whether the node names the dtype of its value."""
    position = _DTYPE_POSITIONS.get(node.target)
    return position is not None and argument(node, position) is not None


def _may_autocast(node: fx.Node) -> bool:
    """Return whether autocast may change the dtype of the node's value."""
    return node.op == "call_function" and not _names_dtype(node) and node.meta["val"].is_floating_point()


#: op -> the position of the dtype among its arguments
_DTYPE_POSITIONS: dict[Any, int] = {aten.to.dtype: 1, aten.to.dtype_layout: 1, aten.to.device: 2}
_DEVICE_OPS = {aten.to.dtype_layout, aten.to.device}
#: op -> the condition under which it returns its first argument unchanged, if sizes, dtype and device stay the same
_NO_OP_CONDITIONS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.to.dtype: _does_not_copy,
    aten.to.dtype_layout: _does_not_copy,
    aten.to.device: _does_not_copy,
    aten.slice.Tensor: _takes_whole_axis,
    aten.expand.default: _always,
    aten.view.default: _always,
    aten.reshape.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.mul.Tensor: _operand_is_one,
    aten.div.Tensor: _operand_is_one,
    aten.dropout.default: _is_in_eval_mode,
    aten.feature_dropout.default: _is_in_eval_mode,
}
