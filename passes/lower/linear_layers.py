"""Choose how a compiler computes the linear layers of a graph that it is about to trace with sizes that it knows.

For one row a layer reads its weight once, so a call could be as fast as the memory. Library matmuls are slower than
that for one row, and each small matmul of an adapter costs a call. As sums of products they are fused with casts, with
additions, and with the dequantisation of a weight:

    weight                        rows                                   computed as
    quantised, in planes          up to ``SUM_ROWS``                     sums
    quantised, in planes          more, or a number that is not known    a matmul of its values, made in each call
    quantised, in planes          a number that no other layer has       a choice of the two in each call
    float32, bfloat16, float16    one, on a CPU                          sums in float32

All other layers are left as they are. The layer whose rows are its own is a language model's head: a prompt has many
rows, and only the last of them goes through the head. The values of a head may be as many as those of all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.quantized.all_schemes import scheme_from_text
from adaptc.passes.quantized.compiled_linear import SUM_DTYPES, SUM_ROWS, linear_by_sums, written_once
from adaptc.passes.quantized.fast_linear import INT4_ROLES, INT4_ROWS, linear_by_kernel
from adaptc.passes.quantized.planar_scheme import PlanarScheme
from adaptc.passes.quantized.table_scheme import TableScheme

aten = torch.ops.aten
_QLINEAR = torch.ops.adaptc.qlinear.default


def with_chosen_layers(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module like ``module``, which is left as it is, whose linear layers choose as they are traced."""
    choices: dict[Any, Callable[..., Tensor]] = {
        _QLINEAR: _quantized_linear,
        torch.ops.adaptc.packed_linear.default: _packed_linear,
        torch.ops.adaptc.product.default: _product,
        aten.linear.default: _linear,
    }
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    rows = {n: _rows_of_call(n) for n in module.graph.find_nodes(op="call_function", target=_QLINEAR)}
    usual = Counter(rows.values()).most_common(1)
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
        new.target = choices.get(new.target, new.target)
        if old in rows and rows[old] != usual[0][0]:
            new.target = _quantized_linear_by_rows
    return fx.GraphModule(module, graph)


def _rows_of_call(layer: fx.Node) -> str:
    """Return the number of rows that a layer takes, as an expression of the sizes of the graph; "" if not known."""
    x: Any = layer.args[0]
    return str(prod(x.meta["val"].shape[:-1])) if "val" in x.meta else ""


def _rows(x: Tensor) -> int | None:
    """Return the number of rows of ``x`` (..., columns), or None where a size is not known."""
    sizes = x.shape[:-1]
    return prod(sizes) if all(type(s) is int for s in sizes) else None


def _quantized_linear(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    found, count = scheme_from_text(scheme), _rows(x)
    if not isinstance(found, PlanarScheme):
        return torch.ops.adaptc.qlinear(x, stored, bias, scheme, rows, columns)
    by_role = dict(zip(found.layout(rows, columns), stored, strict=True))
    if x.dtype in SUM_DTYPES and count is not None and count <= SUM_ROWS:
        return linear_by_sums(found, x, by_role, bias)
    return F.linear(x, found.dequantize(by_role, rows, columns).to(x.dtype), bias)


def _quantized_linear_by_rows(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    found = scheme_from_text(scheme)
    if _rows(x) is not None or not isinstance(found, PlanarScheme) or x.dtype not in SUM_DTYPES:
        return _quantized_linear(x, stored, bias, scheme, rows, columns)
    roles, count = list(found.layout(rows, columns)), len(stored)

    def few_rows(x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (linear_by_sums(found, x, dict(zip(roles, tensors, strict=False)), *tensors[count:] or (None,)),)

    def many_rows(x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        weight = found.dequantize(dict(zip(roles, tensors, strict=False)), rows, columns).to(x.dtype)
        return (F.linear(x, weight, *tensors[count:]),)

    tensors = (x, *stored, *(() if bias is None else (bias,)))
    is_few: Any = prod(x.shape[:-1]) <= SUM_ROWS
    choose: Any = torch.ops.higher_order.cond
    return choose(is_few, few_rows, many_rows, tensors)[0]


def _packed_linear(
    x: Tensor,
    stored: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
    rows: int,
    columns: int,
    packed: Sequence[Tensor],
) -> Tensor:
    found, count = scheme_from_text(scheme), _rows(x)
    if isinstance(found, TableScheme):
        return torch.ops.adaptc.packed_linear(x, stored, bias, scheme, rows, columns, packed)
    roles, own = list(found.layout(rows, columns)), len(stored)

    def few_rows(x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        # Inside of a cond the compiler has no code for the kernel itself.
        given, copies, biases = tensors[:own], tensors[own : own + len(packed)], tensors[own + len(packed) :]
        return (torch.ops.adaptc.packed_linear(x, given, *biases or (None,), scheme, rows, columns, copies),)

    def many_rows(x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        weight = found.dequantize(dict(zip(roles, tensors, strict=False)), rows, columns).to(x.dtype)
        return (F.linear(x, weight, *tensors[own + len(packed) :]),)

    tensors = (x, *stored, *packed, *(() if bias is None else (bias,)))
    if count is not None and count <= INT4_ROWS:
        return linear_by_kernel("int4", found, x, dict(zip(INT4_ROLES, packed, strict=True)), bias)
    if count is not None:
        return many_rows(*tensors)[0]
    choose: Any = torch.ops.higher_order.cond
    return choose(prod(x.shape[:-1]) <= INT4_ROWS, few_rows, many_rows, tensors)[0]


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: Sequence[int], columns: Sequence[int]
) -> Tensor:
    if _is_one_row(x, weight):
        return _sums(x, weight, bias)
    return torch.ops.adaptc.product(x, weight, bias, kind, classes, columns)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _sums(x, weight, bias) if _is_one_row(x, weight) else aten.linear(x, weight, bias)


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    return _rows(x) == 1 and x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in SUM_DTYPES


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (weight.float() * written_once(x.reshape(-1).float())).sum(-1)
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
