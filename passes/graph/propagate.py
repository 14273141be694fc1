"""Update the fake values of a graph after a value that it starts from has changed its size.

The values of some nodes may be out of date, or belong to another shape environment. All nodes that depend on them get
the value that their op gives on the graph's own fakes. All other nodes keep theirs. No op is changed. A value that
torch can only tell from data stays as it is.

Private torch use, with the public route that was tried: ``enable_python_dispatcher``, which composite ops need on
symbolic sizes. Public: ``make_fx`` has it on, but makes a graph that nobody needs here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from adaptc.errors import PassError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import fake_mode_of
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.symbolic_fakes import suppress_size_guards
from adaptc.torch_typing import is_list_or_tuple

aten = torch.ops.aten


@with_graph_lock
def propagate_fakes(graph: fx.Graph, changed_nodes: Collection[fx.Node], modules: nn.Module | None = None) -> int:
    """Update the values that depend on the nodes ``changed_nodes``, and return how many values are new.

    The nodes ``changed_nodes`` have other values than their users were made with. Those that are ops are computed
    again, too. ``modules`` holds the graphs of blocks. Raises PassError, naming the op, if an op does not take its new
    sizes.
    """
    stale, count = set(changed_nodes), 0
    mode = fake_mode_of(graph)
    input_fakes = [n.meta["val"] for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), Tensor)]
    with (
        suppress_size_guards([v for v in input_fakes if getattr(v, "fake_mode", None) is mode]),
        enable_python_dispatcher(),
    ):
        for node in graph.nodes:
            if node.op != "call_function" or "unbacked_bindings" in node.meta:
                continue
            if node not in changed_nodes and stale.isdisjoint(node.all_input_nodes):
                continue
            new, old = _recompute(node, modules), node.meta.get("val")
            if node in changed_nodes or _value_key(new) != _value_key(old):
                node.meta["val"] = new
                stale.add(node)
                count += 1
    return count


def _recompute(node: fx.Node, modules: nn.Module | None) -> Any:
    def value_of(n: fx.Node) -> Any:
        if n.op == "get_attr":
            assert modules is not None
            return modules.get_submodule(str(n.target)) if hasattr(modules, str(n.target)) else n.meta.get("val")
        return n.meta.get("val")

    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
    try:
        with torch.no_grad():
            if (cut := _symbolic_slice(node, value_of)) is not None:
                return cut
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shapes = [tuple(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        raise PassError(f"{node.name} = {node.target} does not take tensors of shapes {shapes}: {first}") from error


def _symbolic_slice(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Tensor | None:
    """Return the value of a slice of a fixed-length tensor from zero to a symbolic size; None for all other nodes.

    torch would check whether the sizes of the capture exceed that length. With more virtual tokens they may. Calls are
    checked elsewhere against the room there is.
    """
    old = node.meta.get("val")
    if node.target is not aten.slice.Tensor or not isinstance(old, Tensor):
        return None
    x, dim, start, end, step = (value_of(a) if isinstance(a := argument(node, i), fx.Node) else a for i in range(5))
    fixed = isinstance(x.shape[dim], int) and step == 1 and (start or 0) == 0
    if not fixed or not isinstance(end, torch.SymInt) or not isinstance(old.shape[dim], torch.SymInt):
        return None
    sizes = list(x.shape)
    sizes[dim] = end
    return x.new_empty_strided(sizes, x.stride())


def _value_key(value: Any) -> Any:
    """Return a key that is equal for values which look alike to the nodes that read them."""
    if isinstance(value, Tensor):
        return tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, value.device
    if is_list_or_tuple(value):
        return tuple(map(_value_key, value))
    return str(value)
