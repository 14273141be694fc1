"""Multiply the tokens of each expert by the expert's part of a quantised stack, and read no other part.

A stack of experts is a weight (experts, in, out) as the ops of grouped matmuls take it. Its stored matrix has the rows
of one expert after those of another, so an expert is a run of rows. The values of one expert are made at a time, and
only of experts that have tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.passes.graph.ops import schema_of
from adaptc.passes.quantized.all_schemes import scheme_text
from adaptc.passes.quantized.quantized_linear import quantized_linear, quantized_matmul
from adaptc.passes.quantized.scheme import StoredMatrix


class QuantizedExperts(StoredMatrix, Protocol):
    """A quantised stack of experts; ``is_transposed`` says that the rows of its matrix are outputs."""

    @property
    def is_transposed(self) -> bool: ...
    @property
    def shape(self) -> torch.Size: ...
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of all experts."""
        ...


#: ops (tokens (n, in), weights (groups, in, out), ends of groups, ...) -> (n, out), by the weight of each group
GROUPED_MATMULS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
#: the gradients of the second one: (tokens, weights, ends of groups, gradient) -> those of tokens and of weights
_BACKWARD = "transformers::grouped_mm_fallback_backward"


def is_grouped_matmul(func: Any) -> bool:
    """Return whether ``func`` multiplies groups of tokens by one weight each, or is the gradient of such an op."""
    return schema_of(func).name in (*GROUPED_MATMULS, _BACKWARD)


def grouped_matmul(
    func: Any, x: Tensor, weight: QuantizedExperts, offs: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    """Return what ``func``, for which :func:`is_grouped_matmul` holds, gives for a quantised stack of experts.

    ``x`` is (tokens, in), with the tokens of each expert in a run. ``offs`` (experts,) has the ends of these runs.
    Calls of other forms read the values of all experts. A frozen weight has no gradient, so zeros stand in its place.
    """
    name = schema_of(func).name
    if name == _BACKWARD:
        (g,) = rest
        return _by_expert(g, weight, offs, not weight.is_transposed), g.new_zeros(()).expand(weight.shape)
    if x.ndim != 2 or offs is None or any(v is not None for v in (*rest, *options.values())):
        return func(x, weight.dequantize(), offs, *rest, **options)
    return _by_expert(x, weight, offs, weight.is_transposed)


def _by_expert(x: Tensor, weight: QuantizedExperts, offs: Tensor | None, by_rows: bool) -> Tensor:
    """Return (tokens, out): ``x`` times the matrix of each token's expert, or its transpose where ``by_rows`` says."""
    assert offs is not None
    rows, columns = weight.matrix_shape
    y = x.new_zeros((x.shape[0], rows // weight.shape[0] if by_rows else columns))
    count = rows // weight.shape[0]
    ends = [int(end) for end in offs]
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end == start:
            continue
        found = weight.scheme.select_rows(weight.stored, (rows, columns), slice(expert * count, (expert + 1) * count))
        if found is None:  # a block of its scales spans two experts
            matrix = weight.dequantize(x.dtype)[expert]
            y[start:end] = x[start:end] @ (matrix if by_rows == weight.is_transposed else matrix.t())
            continue
        scheme, stored = found
        kept = [stored[role] for role in scheme.layout(count, columns)]
        if by_rows:
            y[start:end] = quantized_linear(x[start:end], scheme_text(scheme), kept, (count, columns), None)
        else:
            y[start:end] = quantized_matmul(x[start:end], scheme_text(scheme), kept, (count, columns))
    return y
