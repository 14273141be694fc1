"""Compute linear layers with quantised weights in code that is compiled ahead of time and runs without adaptc.

A layer becomes ATen ops on its stored tensors, which never make a float copy of the weight, where there is a way:

    integer, 8 bits, int8 activations   any dtype, any rows    ``_int_mm`` of the rounded input
    integer, 8 bits, a scale per row    bfloat16, few rows     ``_weight_int8pack_mm``
    integer, 8 bits, a scale per row    float32, few rows      sums of products, which the compiler fuses with the cast
    integer, 4 bits in groups           bfloat16               ``_weight_int4pack_mm_for_cpu`` of a packed copy

Where few rows take another way than many, the layer is a ``torch.cond`` on the number of rows. All other layers
dequantise their weight in each call, one weight at a time. The ops and their conditions are those of ``fast_linear``,
but that the last one takes any number of rows. The compiler has no code for it inside a ``torch.cond``.

Code that runs beside adaptc may call ops of ours. ``adaptc::packed_linear`` is a layer whose few rows take a kernel
that reads a copy of the weight: the last one above, and that of bitsandbytes for tables.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import operands
from adaptc.passes.protocol.trace import inline, trace_function
from adaptc.passes.quantized.all_schemes import scheme_text
from adaptc.passes.quantized.fast_linear import (
    INT8_ROWS,
    kernel_for,
    linear_by_kernel,
    packed_table,
    prepared_tensors,
)
from adaptc.passes.quantized.planar_scheme import PlanarScheme, in_planes
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.table_scheme import TableScheme

#: the number of rows up to which sums are faster than a matmul of dequantised values
SUM_ROWS = 4
#: the dtypes of weights whose layers may be sums in float32
SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Linear = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]


@dataclass(frozen=True)
class CompiledLinear:
    """A layer's computation: a function of the input, of ``tensors`` by role, and of the bias.

    ``for_many`` takes its place above ``most_rows`` rows. It is None where the function serves any number of rows.
    """

    tensors: Mapping[str, Tensor]
    compute: _Linear
    most_rows: int = 0
    for_many: _Linear | None = None


def compiled_linear(weight: QuantizedTensor) -> CompiledLinear | None:
    """Return how a layer with this weight is computed without a float copy of it; None where there is no way."""
    scheme, kind = weight.scheme, kernel_for(weight, weight.dtype)
    if weight.is_transposed or weight.ndim != 2 or weight.device.type != "cpu":
        return None
    if kind is not None:

        def by_kernel(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
            return linear_by_kernel(kind, scheme, x, tensors, bias)

        tensors = prepared_tensors(kind, weight)
        if kind != "int8":
            return CompiledLinear(tensors, by_kernel)
        return CompiledLinear({**weight.stored, **tensors}, by_kernel, INT8_ROWS, _dequantized_linear(weight))
    planes = in_planes(scheme, weight.stored, weight.matrix_shape) if weight.dtype in SUM_DTYPES else None
    if planes is None:
        return None
    planar, stored = planes
    # Something else may read the weight as it is stored, whose roles have the same names.
    names = {role: role if t is weight.stored.get(role) else f"plane_{role}" for role, t in stored.items()}

    def by_role(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: tensors[name] for role, name in names.items()}

    def by_sums(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return linear_by_sums(planar, x, by_role(tensors), bias)

    def by_values(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, planar.dequantize(by_role(tensors), *weight.matrix_shape).to(x.dtype), bias)

    return CompiledLinear({names[r]: t for r, t in stored.items()}, by_sums, SUM_ROWS, by_values)


def linear_beside_adaptc(weight: QuantizedTensor) -> CompiledLinear | None:
    """Return how a layer with this weight is computed in compiled code that runs beside adaptc.

    None where ``adaptc::qlinear`` is the way.
    """
    scheme, kind = weight.scheme, kernel_for(weight, weight.dtype)
    if weight.ndim != 2 or weight.is_transposed or weight.device.type != "cpu":
        return None
    if kind == "int8_dynamic":
        return compiled_linear(weight)
    packed: dict[str, Tensor] = {}
    if kind == "int4":
        packed = prepared_tensors(kind, weight)
    elif isinstance(scheme, TableScheme) and weight.dtype == torch.bfloat16:
        packed = {f"packed_{i}": t for i, t in enumerate(packed_table(weight))}
    if not packed:
        return None
    roles, text, (rows, columns) = list(weight.stored), scheme_text(scheme), weight.matrix_shape

    def compute(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        stored, copies = ([tensors[n] for n in of] for of in (roles, packed))
        return torch.ops.adaptc.packed_linear(x, stored, bias, text, rows, columns, copies)

    return CompiledLinear({**weight.stored, **packed}, compute)


def linear_by_sums(scheme: PlanarScheme, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (..., rows), as sums in float32 over the columns, rounded to the dtype of ``x`` once.

    It is for graphs that are compiled: the compiler makes one loop of it, and no tensor of the size of the weight.
    """
    inputs = written_once(x.reshape(-1, x.shape[-1]).float())
    if scheme.has_row_scales:
        planes = [codes.float() for codes in scheme.plane_codes(stored)]
    else:
        planes = scheme.planes(stored)
    products = [i.unsqueeze(-2) * w for i, w in zip(inputs.chunk(len(planes), 1), planes, strict=True)]
    y = sum(products[1:], products[0]).sum(-1)
    if scheme.has_row_scales:
        y = y * stored["scales"][:, 0]
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def written_once(x: Tensor) -> Tensor:
    """Return ``x`` as it is, with strides, for which a compiler writes it to memory once.

    Else a loop over outputs may compute it, or only cast it, for each of them.
    """
    return torch.as_strided(x, x.shape, x.stride())


def _dequantized_linear(weight: QuantizedTensor) -> _Linear:
    def compute(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.values_of({role: tensors[role] for role in weight.stored}), bias)

    return compute


class LayerWriter:
    """The writer of such layers into a program.

    ``branches`` maps names to the graphs of ways that a ``torch.cond`` chooses from. The program's root must have them.
    """

    def __init__(self, lifted: LiftedProgram) -> None:
        self.lifted = lifted
        self.branches: dict[str, fx.GraphModule] = {}

    def replace(self, layer: fx.Node, linear: CompiledLinear, placeholders: Mapping[str, fx.Node]) -> None:
        """Let the layer be computed as ``linear`` says, whose tensors have the ``placeholders``, by role."""
        x, _, bias = operands(layer)
        inputs = [x, *placeholders.values(), *([] if bias is None else [bias])]
        roles = list(placeholders)
        rows: Any = prod(x.meta["val"].shape[:-1])  # a symbol where it may vary
        if linear.for_many is None:
            made = self._inline(layer, _trace(linear.compute, roles, inputs), inputs)
        elif isinstance(rows, int):
            compute = linear.compute if rows <= linear.most_rows else linear.for_many
            made = self._inline(layer, _trace(compute, roles, inputs), inputs)
        else:
            ways = [_trace(compute, roles, inputs) for compute in (linear.compute, linear.for_many)]
            made = self._choose(layer, rows, linear.most_rows, ways, inputs)
        layer.replace_all_uses_with(made)
        self.lifted.graph.erase_node(layer)
        self.lifted.nodes.pop(layer.name, None)

    def _inline(self, layer: fx.Node, region: fx.Graph, inputs: Sequence[fx.Node]) -> fx.Node:
        out = inline(self.lifted.graph, region, inputs, layer, layer, lambda role: {})
        for node in _made_before(out, set(inputs)):
            node.meta.pop("custom", None)
            self.lifted.nodes[node.name] = node
        return out

    def _choose(
        self, layer: fx.Node, count: Any, most_rows: int, ways: Sequence[fx.Graph], inputs: Sequence[fx.Node]
    ) -> fx.Node:
        """Return the result of the first of ``ways`` for up to ``most_rows`` rows, else of the second."""
        graph, x = self.lifted.graph, inputs[0]
        with graph.inserting_before(layer):
            rows: Any = 1
            for axis in range(x.meta["val"].ndim - 1):
                size = graph.call_function(torch.ops.aten.sym_size.int, (x, axis))
                size.meta["val"] = x.meta["val"].shape[axis]
                before, rows = rows, size if axis == 0 else graph.call_function(operator.mul, (rows, size))
                if axis:
                    rows.meta["val"] = before.meta["val"] * size.meta["val"]
            few = graph.call_function(operator.le, (rows, most_rows))
            few.meta["val"] = count <= most_rows
            chosen: list[fx.Node] = []
            for way in ways:
                name = f"quantized_linear_{len(self.branches)}"
                way.output_node().args = (way.output_node().args,)
                self.branches[name] = fx.GraphModule({}, way)
                chosen.append(graph.get_attr(name))
            result = graph.call_function(torch.ops.higher_order.cond, (few, *chosen, tuple(inputs)))
            result.meta["val"] = (layer.meta["val"],)
            made = graph.call_function(operator.getitem, (result, 0))
        made.meta = {k: v for k, v in layer.meta.items() if k != "custom"}
        return made


def _trace(compute: _Linear, roles: Sequence[str], inputs: Sequence[fx.Node]) -> fx.Graph:
    """Return ``compute`` as a graph whose placeholders are the input, the tensors by role, and the bias if any."""
    count = len(roles)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        bias = tensors[count] if len(tensors) > count else None
        return compute(x, dict(zip(roles, tensors, strict=False)), bias)

    return trace_function(call, [n.meta["val"] for n in inputs])


def _made_before(out: fx.Node, inputs: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes that ``out`` is made of, from ``inputs``."""
    found: dict[fx.Node, None] = {}
    stack = [out]
    while stack:
        node = stack.pop()
        if node not in inputs and node not in found and node.op == "call_function":
            found[node] = None
            stack.extend(node.all_input_nodes)
    return list(found)
