"""Choose how a compiler computes the linear layers of a graph that it is about to trace with sizes that it knows.

For one row a layer reads its weight once, so a call takes as long as the memory. Library matmuls in half precision are
slower for one row, and each small matmul of an adapter costs a call. As sums of products they are fused with casts,
with additions, and with the dequantisation of a weight:

    weight                  rows                                   computed as
    quantised, in planes    up to ``SUM_ROWS``                     sums
    quantised, in planes    more, or a number that is not known    a matmul of its values, made in each call
    bfloat16, float16       one                                    sums
    float32                 one, up to ``SMALL_WEIGHT`` elements   sums; above, libraries are as fast as memory

All other layers are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.quantized.all_schemes import scheme_from_text
from adaptc.passes.quantized.compiled_linear import SUM_DTYPES, SUM_ROWS, linear_by_sums
from adaptc.passes.quantized.planar_scheme import PlanarScheme

aten = torch.ops.aten

#: the elements of a float32 weight up to which a call costs more than its reading
SMALL_WEIGHT = 1 << 17


def with_chosen_layers(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module like ``module``, which is left as it is, whose linear layers choose as they are traced."""
    choices = {torch.ops.adaptc.qlinear.default: _quantized_linear, aten.linear.default: _linear}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
        new.target = choices.get(new.target, new.target)
    return fx.GraphModule(module, graph)


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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    is_small = weight.dtype == torch.float32 and weight.numel() <= SMALL_WEIGHT
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    if not (is_small or is_half) or x.device.type != "cpu" or x.dtype != weight.dtype or _rows(x) != 1:
        return aten.linear(x, weight, bias)
    row = x.reshape(-1).float()
    # The stride makes the compiler write the row to memory once. Else it would compute it again for each output.
    row = torch.as_strided(row, row.shape, (1,))
    y = (weight.float() * row).sum(-1)
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
