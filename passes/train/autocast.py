"""Make a graph, of training or of a call, follow ``torch.autocast`` as the model itself would.

Takes the graph of a module, captured without autocast. ``torch.export`` writes a dtype check before each cast, and
keeps casts that did nothing at capture. The casts stay and act. The checks of values between ops are removed, since
under autocast these values have other dtypes than at capture.

A check that names its place replaces the old one where memory is written to in place. There a cast that copies differs
from a cast that returns its argument.

A dtype that the model read off a tensor at capture (``x.to(y.dtype)``) stays fixed. So values are cast to float32 where
the model might have them in half precision: more digits, never fewer. Masks are filled with the most negative number of
a dtype. That number follows the dtype that the values have at run time. What a cache is given is cast to the cache's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.module_paths import module_path
from adaptc.passes.graph.mutation import find_written_nodes, is_metadata_assert
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult

aten = torch.ops.aten

#: op -> the position of the fill value among its arguments
_FILL_VALUE_POSITIONS: dict[Any, int] = {aten.masked_fill.Scalar: 2, aten.masked_fill_.Scalar: 2}

#: op that writes to its first argument, as a cache of keys does -> the position of what it writes
_WRITTEN_VALUE_POSITIONS: dict[Any, int] = {
    aten.index_copy_.default: 3,
    aten.index_put_.default: 2,
    aten.scatter_.src: 3,
}


@dataclass(frozen=True)
class FollowAutocast(GraphPass):
    """A pass that makes a graph follow autocast.

    ``user_inputs`` are the names of the user's placeholders, whose checks stay. The count is that of the checks
    removed, the fill values that follow their tensors' dtypes, and the values cast before they are written.
    """

    name: ClassVar[str] = "follow_autocast"

    user_inputs: Collection[str] = field(default=(), repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = find_written_nodes(subject)
        module, count = subject.owning_module, 0
        for node in list(subject.nodes):
            inner = getattr(module, node.target, None) if node.op == "get_attr" else None
            if isinstance(inner, fx.GraphModule):
                count += _follow_in_subgraph(module, node.target, inner)
            elif is_metadata_assert(node):
                source, dtype = node.args[0], argument(node, 3)
                if source.name in self.user_inputs or dtype is None or not dtype.is_floating_point:  # type: ignore[union-attr]
                    continue
                if source in dirty:
                    with subject.inserting_before(node):
                        subject.call_function(check_dtype, (source, dtype, _location(node)))
                subject.erase_node(node)
                count += 1
            elif node.target is aten.view.dtype:
                with subject.inserting_before(node):
                    subject.call_function(check_dtype, (node.args[0], node.args[0].meta["val"].dtype, _location(node)))
            elif node.target in _FILL_VALUE_POSITIONS:
                count += _follow_in_fill(node)
            elif node.target in _WRITTEN_VALUE_POSITIONS:
                position = _WRITTEN_VALUE_POSITIONS[node.target]
                with subject.inserting_before(node):
                    written = subject.call_function(cast_as, (argument(node, position), node.args[0]))
                node.update_arg(position, written)
                count += 1
        return PassResult(subject, count)


def _follow_in_subgraph(module: Any, name: str, inner: fx.GraphModule) -> int:
    """Make the graph of a block follow autocast, and return the count.

    Several programs may share the block, so a copy of it is changed and put in its place.
    """
    copied = fx.GraphModule(inner, copy_graph(inner.graph))
    count = FollowAutocast()(copied.graph).count
    if count:
        copied.recompile()
        setattr(module, name, copied)
    return count


def _follow_in_fill(node: fx.Node) -> bool:
    """Let a fill with the least or greatest number of a dtype follow the tensor's dtype at run time.

    Returns whether the node is such a fill.
    """
    value, number = node.args[0].meta.get("val"), argument(node, _FILL_VALUE_POSITIONS[node.target])  # type: ignore[union-attr]
    if not isinstance(value, Tensor) or not value.is_floating_point() or not isinstance(number, float):
        return False
    if abs(number) != torch.finfo(value.dtype).max:
        return False
    with node.graph.inserting_before(node):
        bound = node.graph.call_function(dtype_limit, (node.args[0], number > 0))
    node.update_arg(_FILL_VALUE_POSITIONS[node.target], bound)
    return True


def _location(node: fx.Node) -> str:
    """Return the name of the innermost module of a node, and that of the tensor it reads, for errors."""
    return f"{module_path(node, ()) or 'the model'} ({node.args[0]})"


def dtype_limit(x: Tensor, greatest: bool) -> float:
    """Return the greatest or the least number of x's dtype."""
    info = torch.finfo(x.dtype)
    return info.max if greatest else info.min


def cast_as(x: Tensor, other: Tensor) -> Tensor:
    """Return x in the dtype of ``other``; x itself if it has that dtype."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def check_dtype(x: Tensor, dtype: torch.dtype, location: str) -> None:
    """Raise AdaptcError where x does not have the ``dtype`` of the capture, without which the result would differ."""
    if x.dtype != dtype:
        raise AdaptcError(
            f"{location}: the model writes to a tensor, or reads its bits, that was {dtype} when it was captured and "
            f"is {x.dtype} under autocast, where it would do something else. Train outside of torch.autocast, with "
            "model.to(torch.bfloat16) before adaptc.compile for half precision"
        )


def cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Return x in ``dtype``, or x itself where either is None."""
    # Not x.to(x.dtype): the compiler of torch 2.11 loses the gradients of results that an op returns unchanged.
    return x if x is None or dtype is None or x.dtype == dtype else x.to(dtype)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``backward`` to run with autocast off, in the dtypes of its tensors, also if the caller left it on."""

    @wraps(backward)
    def run(ctx: Any, *gs: Tensor | None) -> Any:
        kinds = {g.device.type for g in gs if g is not None}
        with _off(next(iter(kinds), "cpu")):
            return backward(ctx, *gs)

    return run


def _off(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
