"""Estimate the cost of code: operations of nodes and regions, as sympy expressions in a program's own free sizes.

The nodes must have fake values. The expressions are over positive integers, with the widths of layers and the ranks of
adapters as numbers. The callers decide what is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.parsing.sympy_parser import parse_expr
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.mutation import has_view_schema
from adaptc.passes.graph.pytree import pytree
from adaptc.torch_typing import shape_of

aten = torch.ops.aten

#: op -> position of the operand whose last axis the op sums over
_REDUCED_OPERANDS = {
    aten.linear: 0,
    aten.matmul: 0,
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.addmm: 1,
    aten.baddbmm: 1,
    aten.linalg_solve_triangular: 0,
    aten.linalg_solve: 0,
    aten.linalg_inv: 0,
}
#: functions in torch's expressions of sizes (torch.utils._sympy.functions), in terms of sympy's own
_UNARY_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "CeilToInt": sympy.ceiling,
    "FloorToInt": sympy.floor,
    "TruncToInt": sympy.floor,
    "ToFloat": lambda a: a,
    "Identity": lambda a: a,
}
_BINARY_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CleanDiv": lambda a, b: a / b,
    "CeilDiv": lambda a, b: sympy.ceiling(a / b),
    "IntTrueDiv": lambda a, b: a / b,
    "PythonMod": lambda a, b: a - b * sympy.floor(a / b),
    "PowByNatural": lambda a, b: a**b,
}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)


@dataclass(frozen=True)
class OperationCount:
    """The operations of a piece of code, as sympy expressions in the program's free sizes.

    ``per_call`` counts those that depend on a call's inputs, ``hoistable`` those on weights and slots alone.
    """

    per_call: Any = sympy.S.Zero
    hoistable: Any = sympy.S.Zero

    def __add__(self, other: OperationCount) -> OperationCount:
        return OperationCount(self.per_call + other.per_call, self.hoistable + other.hoistable)


def count_operations(region: fx.Graph, call_input_count: int) -> OperationCount:
    """Return the operations of a region whose first ``call_input_count`` inputs differ from call to call."""
    per_call_nodes: set[fx.Node] = set()
    sums: list[Any] = [sympy.S.Zero, sympy.S.Zero]
    inputs = region.find_nodes(op="placeholder")
    per_call_nodes.update(inputs[:call_input_count])
    for node in region.nodes:
        if node.op != "call_function":
            continue
        if any(n in per_call_nodes for n in node.all_input_nodes):
            per_call_nodes.add(node)
        sums[node not in per_call_nodes] += count_node_operations(node)
    return OperationCount(*sums)


def count_node_operations(node: fx.Node) -> Any:
    """Return the operations of one node: two per multiplied and summed pair, else one per element, none for a view."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or has_view_schema(node.target):
        return sympy.S.Zero
    out = _element_count(value.shape)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _REDUCED_OPERANDS:
        operand: Any = node.args[_REDUCED_OPERANDS[packet]]
        return 2 * out * size_expression(operand.meta["val"].shape[-1])
    if packet in _CONVOLUTIONS:
        return 2 * out * _element_count(node.args[1].meta["val"].shape[1:])  # type: ignore[union-attr]
    return out


def _element_count(shape: Sequence[Any]) -> Any:
    return sympy.Mul(*(size_expression(s) for s in shape))


def size_expression(size: Any) -> Any:
    """Return a size, an int or a symbolic one, as a sympy expression of positive integers."""
    return sympy.Integer(size) if isinstance(size, int) else _parse_size(str(size))


def _modular_index(a: Any, b: Any, c: Any) -> Any:
    return sympy.Mod(sympy.floor(a / b), c)


@cache
def _parse_size(text: str) -> Any:
    """Return the text of a symbolic size as an expression of positive integers."""
    parsed: Any = parse_expr(
        text, local_dict={**_UNARY_FUNCTIONS, **_BINARY_FUNCTIONS, "ModularIndexing": _modular_index}
    )
    # Any other function in torch's expression stands for a size of which nothing is known.
    for unknown in parsed.atoms(AppliedUndef):
        parsed = parsed.xreplace({unknown: sympy.Symbol(str(unknown))})
    return parsed.subs({s: sympy.Symbol(str(s), integer=True, positive=True) for s in parsed.free_symbols})


def example_sizes(program: ExportedProgram) -> dict[str, int]:
    """Return the value of each free size in the example inputs; empty for a program that was saved without them."""
    if program.example_inputs is None:
        return {}
    values, graph_inputs = pytree.tree_leaves(program.example_inputs), user_inputs(program)
    if len(values) != len(graph_inputs):
        return {}
    out: dict[str, int] = {}
    for value, fake in zip(values, graph_inputs.values(), strict=True):
        if isinstance(value, Tensor) and isinstance(fake, Tensor):
            out |= {str(s): int(n) for s, n in zip(shape_of(fake), value.shape, strict=True) if not isinstance(s, int)}
    return out


def evaluate_at_sizes(expression: Any, sizes: Mapping[str, int]) -> Any:
    """Return the value of an expression in free sizes at these sizes."""
    # A size that no input has, which the program computes from its data, counts as one.
    return expression.subs({s: sizes.get(str(s), 1) for s in expression.free_symbols})
