"""Let an ONNX file compute a call without an adapter by a branch of its own, which has no node of an adapter.

Before: one graph, in which factors of rank zero give the base. Each site costs its nodes also where no adapter is fed.
After: one ``If`` node. Its condition is whether any input has elements that has none by default. Both branches read the
same initializers, so weights are written and kept once.

    size = Max(Size(lora_A), Size(lora_B), ...)
    logits = If(size > 0, then_branch=<the graph>, else_branch=<the graph without sums whose second term is zero>)

A site whose base needs values, such as a magnitude of DoRA, keeps its nodes in both branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adaptc.exporters.prepare_export import PreparedExport

#: operators that keep a tensor of zeros as one, whatever their other inputs are
_KEEP_ZEROS = {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Cast", "Identity", "Neg"}


def add_base_branch(model: Any, prepared: PreparedExport) -> bool:
    """Give an ``onnx_ir.Model`` a branch for the base, where that leaves nodes out; return whether it does.

    The model has the names of ``prepared`` already, and the defaults of its inputs. Inputs and outputs stay as they
    are.
    """
    graph = model.graph
    by_name = {v.name: v for v in graph.inputs}
    empty = [by_name[name] for name, value in prepared.base_values.items() if not value.numel()]
    sizes = {str(d) for v in empty for d, n in zip(v.shape, prepared.base_values[v.name].shape, strict=True) if not n}
    equal = dict(_sums_with_zero(graph, sizes, {by_name[name] for name in prepared.base_values}))
    if not equal:
        return False
    _branch(graph, empty, equal)
    return True


def _sums_with_zero(graph: Any, empty_sizes: set[str], inputs: set[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (sum, the term that it equals) for each sum whose other term is zero while ``empty_sizes`` are.

    A product over an axis of no elements is zero, whatever it reads. Zeros times an activation may be no number. So
    they stay zeros after a product with an initializer or one of ``inputs``, such as a scale, and after no other one.
    """
    zero: set[Any] = set()

    def is_empty(value: Any, axes: slice) -> bool:
        return value.shape is not None and any(str(n) in empty_sizes for n in list(value.shape)[axes])

    for node in graph:
        if node.domain or len(node.outputs) != 1 or any(i is None for i in node.inputs):
            continue
        inner = list(node.inputs)
        out = node.outputs[0]
        if node.op_type == "MatMul":
            axes = slice(-2, -1) if len(inner[1].shape or ()) > 1 else slice(None)
            if is_empty(inner[0], slice(-1, None)) or is_empty(inner[1], axes):
                zero.add(out)
        elif node.op_type in _KEEP_ZEROS and inner[0] in zero:
            zero.add(out)
        elif node.op_type == "Mul" and zero & set(inner):
            if all(i in zero or i in inputs or i.is_initializer() for i in inner):
                zero.add(out)
        elif node.op_type == "Add" and zero & set(inner):
            term = inner[0] if inner[1] in zero else inner[1]
            if term.dtype == out.dtype and _same_shape(term, out):
                yield out, term


def _same_shape(left: Any, right: Any) -> bool:
    """Return whether two values are known to have one shape."""
    if left.shape is None or right.shape is None:
        return False
    shapes = [[str(n) for n in v.shape] for v in (left, right)]
    return "None" not in shapes[0] and shapes[0] == shapes[1]


def _branch(graph: Any, empty: list[Any], equal: Mapping[Any, Any]) -> None:
    """Move the nodes of ``graph`` into a branch, and put one without the sums ``equal`` beside it."""
    import onnx_ir

    taken = {v.name for node in graph for v in node.outputs} | {v.name for v in (*graph.inputs, *graph.outputs)}
    taken |= set(graph.initializers)

    def name(text: str) -> str:
        while text in taken:
            text += "_"
        taken.add(text)
        return text

    outputs = list(graph.outputs)
    computed = [o for o in outputs if o.producer() is not None]
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    adapted = onnx_ir.Graph([], computed, nodes=nodes, name="adapted")
    base = _without_sums(adapted, equal)
    for node in base:
        for value in node.outputs:
            value.name = name(f"{value.name}.base")
    found: list[Any] = []
    for value in computed:
        found.append(onnx_ir.Value(name=value.name, type=value.type, shape=value.shape))
        value.name = name(f"{value.name}.adapted")
    none = name("no_elements")
    zero = onnx_ir.Value(name=none, const_value=onnx_ir.tensor(np.zeros((), np.int64), name=none))
    graph.initializers[none] = zero
    integer = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    scalar = onnx_ir.Shape([])
    sizes = [onnx_ir.Value(name=name(f"{v.name}.size"), type=integer, shape=scalar) for v in empty]
    largest = onnx_ir.Value(name=name("largest_size"), type=integer, shape=scalar)
    fed = onnx_ir.Value(name=name("has_adapter"), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL), shape=scalar)
    branches = [onnx_ir.AttrGraph("then_branch", adapted), onnx_ir.AttrGraph("else_branch", base)]
    graph.extend([onnx_ir.Node("", "Size", [v], outputs=[s]) for v, s in zip(empty, sizes, strict=True)])
    graph.append(onnx_ir.Node("", "Max", sizes, outputs=[largest]))
    graph.append(onnx_ir.Node("", "Greater", [largest, zero], outputs=[fed]))
    graph.append(onnx_ir.Node("", "If", [fed], branches, outputs=found))
    made = dict(zip(computed, found, strict=True))
    graph.outputs.extend([made.get(o, o) for o in outputs])


def _without_sums(adapted: Any, equal: Mapping[Any, Any]) -> Any:
    """Return a copy of the graph ``adapted`` that reads a term in place of each sum in ``equal``."""
    import onnx_ir

    base = adapted.clone(allow_outer_scope_values=True)
    copies = {o: c for a, b in zip(adapted, base, strict=True) for o, c in zip(a.outputs, b.outputs, strict=True)}
    ends, terms = list(base.outputs), dict[Any, Any]()
    base.outputs.clear()
    for total, term in equal.items():
        while term in equal:
            term = equal[term]
        terms[copies[total]] = copies.get(term, term)
        onnx_ir.convenience.replace_all_uses_with(copies[total], terms[copies[total]])
    own, given = set(copies.values()), set[Any]()
    for i, output in enumerate(ends):
        value = terms.get(output, output)
        if value not in own or value in given:
            # A branch gives values of its own, each once.
            node = onnx_ir.node("Identity", [value])
            made = node.outputs[0]
            made.name, made.type, made.shape = f"output_{i}", value.type, value.shape
            base.append(node)
            value = made
        given.add(value)
        base.outputs.append(value)
    for node in reversed(list(base)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            base.remove(node, safe=True)
    return base
