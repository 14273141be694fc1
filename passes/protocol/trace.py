"""Trace a pure function, and put its graph into a program as a tagged region.

``trace_function`` runs a function on fake tensors of the graph's own mode and returns its ATen graph. ``inline`` copies
that graph behind a node. Symbolic sizes stay symbolic because the fakes share the program's shape environment. A region
holds nothing but ATen ops on its inputs. A function that closes over a tensor is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.errors import MethodError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.ops import Op, cast, operands
from adaptc.passes.graph.symbolic_fakes import suppress_size_guards
from adaptc.passes.protocol.method import Method


@with_graph_lock
def trace_function(fn: Callable[..., Tensor], fakes: Sequence[Tensor]) -> fx.Graph:
    """Return ``fn`` as a graph whose placeholders are ``fakes``, in the training dialect (composite ops kept).

    Raises MethodError if ``fn`` reads a tensor that is not an argument.
    """
    # With gradients off, as the caller may have them, the region would lack what training needs.
    with torch.inference_mode(False), torch.enable_grad(), suppress_size_guards(fakes):
        graph = make_fx(fn, pre_dispatch=True)(*(f.clone() if f.is_inference() else f for f in fakes)).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise MethodError(f"a method may only use its arguments, but {fn} reads {node.target!r} from outside")
    return graph


def trace_region(
    method: Method, op: Op, region_kind: str, slot_names: Sequence[str], has_scale: bool, fakes: Sequence[Tensor]
) -> fx.Graph:
    """Return a method's region at a site, as a graph. ``region_kind`` decides what it reads and computes:

        input                  x               the changed input of the layer
        apply, apply_bias      x, y, W[, b]    the changed output of the layer
        weight                 W               the changed weight
        weight_over            W0, W           the changed weight, where other adapters made W of the base W0
        bias, new_bias         y[, b]          y with the change of the bias, which a changed weight leaves out
        bias_value             b               the changed bias itself
        fused, fused_bias      x, W[, b]       the layer and its adapter in one

    Where the bias depends on the weight (``bias_over``), the three regions of the bias read the base W0 after b.

    After these inputs come the slots called ``slot_names``, then the scale if ``has_scale``. Equal arguments give
    graphs that are equal node by node.
    """

    def split(tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        return dict(zip(slot_names, tensors, strict=False)), tensors[-1] if has_scale else None

    def change_input(x: Tensor, *slots: Tensor) -> Tensor:
        return method.input(op, x, *split(slots))

    def change_output(x: Tensor, y: Tensor, w: Tensor, *slots: Tensor) -> Tensor:
        return method.apply(op, x, y, op.canonical(w), None, *split(slots))

    def change_output_with_bias(x: Tensor, y: Tensor, w: Tensor, b: Tensor, *slots: Tensor) -> Tensor:
        return method.apply(op, x, y, op.canonical(w), b, *split(slots))

    def fused(x: Tensor, w: Tensor, *slots: Tensor) -> Tensor:
        return method.kernels.apply(op, x, op.canonical(w), None, *split(slots))

    def fused_with_bias(x: Tensor, w: Tensor, b: Tensor, *slots: Tensor) -> Tensor:
        return method.kernels.apply(op, x, op.canonical(w), b, *split(slots))

    def change_weight(w: Tensor, *slots: Tensor) -> Tensor:
        return op.stored(method.weight(op, op.canonical(w), *split(slots)))

    def change_weight_over_base(base: Tensor, w: Tensor, *slots: Tensor) -> Tensor:
        return op.stored(method.weight_over(op, op.canonical(base), op.canonical(w), *split(slots)))

    def bias_of(b: Tensor | None, rest: Sequence[Tensor]) -> Tensor | None:
        if not method.bias_reads_weight():
            return method.bias(op, b, *split(rest))
        return method.bias_over(op, op.canonical(rest[0]), b, b, *split(rest[1:]))

    def change_bias(y: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        new = bias_of(b, rest)
        return y if new is b or new is None else cast(y + op.along_out(new - b, y), y.dtype)

    def add_new_bias(y: Tensor, *rest: Tensor) -> Tensor:
        new = bias_of(None, rest)
        return y if new is None else cast(y + op.along_out(new, y), y.dtype)

    def replace_bias(b: Tensor, *rest: Tensor) -> Tensor:
        new = bias_of(b, rest)
        return b if new is None else cast(new, b.dtype)

    functions = {
        "input": change_input,
        "apply": change_output,
        "apply_bias": change_output_with_bias,
        "fused": fused,
        "fused_bias": fused_with_bias,
        "weight": change_weight,
        "weight_over": change_weight_over_base,
        "bias": change_bias,
        "new_bias": add_new_bias,
        "bias_value": replace_bias,
    }
    return trace_function(functions[region_kind], fakes)


def output_region_inputs(node: fx.Node, y: fx.Node) -> tuple[str, list[fx.Node]]:
    """Return the kind of a region behind ``node``, and its inputs before the slots; ``y`` is the output so far."""
    x, w, b = operands(node)
    return ("apply", [x, y, w]) if b is None else ("apply_bias", [x, y, w, b])


def fused_region_inputs(consumer: fx.Node) -> tuple[str, list[fx.Node]]:
    """Return the kind of a fused region in the place of a layer, and its inputs before the slots."""
    x, w, b = operands(consumer)
    return ("fused", [x, w]) if b is None else ("fused_bias", [x, w, b])


def trace_key(fakes: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return a key that is equal for inputs which trace to the same region."""
    return tuple(
        None if t is None else (str(tuple(t.size())), str(t.stride()), t.dtype, t.device, t.requires_grad)
        for t in fakes
    )


def first_difference(one: fx.Graph, other: fx.Graph) -> tuple[str, str] | None:
    """Return the texts of the first two nodes in which two regions differ; None for equal regions.

    The sizes of values are not compared: they may differ.
    """
    node_numbers: dict[fx.Node, int] = {}
    for a, b in zip_longest(one.nodes, other.nodes):
        if a is None or b is None or _node_key(a, node_numbers) != _node_key(b, node_numbers):
            return tuple("nothing more" if n is None else _node_text(n) for n in (a, b))  # type: ignore[return-value]
        node_numbers[a] = node_numbers[b] = len(node_numbers)
    return None


def _node_key(node: fx.Node, node_numbers: Mapping[fx.Node, int]) -> tuple[Any, ...]:
    """Return a key without names, equal for nodes that compute the same from the same inputs."""
    if node.op == "placeholder":
        return (node.op,)
    args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{node_numbers[n]}")
    return (node.op, None if node.op == "output" else node.target, str(args))


def _node_text(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    return f"{node.target}({', '.join(map(str, [*node.args, *(f'{k}={v}' for k, v in node.kwargs.items())]))})"


def inline(
    graph: fx.Graph,
    region: fx.Graph,
    inputs: Sequence[fx.Node],
    before: fx.Node,
    like: fx.Node,
    tag: Callable[[str], dict[str, Any]],
) -> fx.Node:
    """Copy ``region`` into ``graph`` before a node and return its output node.

    The new nodes take their module stack and stack trace from ``like``. They carry ``meta["custom"]["adaptc"] =
    tag(role)``. The role is the node's index in the region, and "out" for the result.
    """
    values: dict[fx.Node, fx.Node] = {}
    new: list[fx.Node] = []
    result: fx.Node | None = None
    feed = iter(inputs)
    inherited = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
    with graph.inserting_before(before):
        for node in region.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "output":
                result = values[node.args[0]]  # type: ignore[index]
            else:
                copied = graph.node_copy(node, values.__getitem__)
                copied.meta = {**inherited, "val": node.meta["val"], "torch_fn": (copied.name, str(node.target))}
                values[node] = copied
                new.append(copied)
        assert result is not None
        if result not in new:
            # The region returns one of its inputs; an alias gives it a node of its own that can carry the tag.
            val = result.meta["val"]
            result = graph.call_function(torch.ops.aten.alias.default, (result,))
            result.meta = {**inherited, "val": val, "torch_fn": (result.name, "alias")}
            new.append(result)
    for i, node in enumerate(new):
        node.meta["custom"] = {"adaptc": tag("out" if node is result else str(i))}
    return result
