"""Compute layers with LoRA whose factors were packed once per binding: one layer, or siblings that share their input.

    packed_lora(x, W, bias, A, B, table, scales, widths)    y = x W^T + bias + scale_i * (x A_i^T) B_i^T

x is (M, K). The layers i, of ``widths``, have their W stacked to (sum of widths, K), their A to (sum of ranks, K), and
their biases too. B (sum of widths times ranks,) has their up projections transposed, (rank, width), one after another
(:func:`packed_factors`): a program then reads few ranks of many columns, in order. y is (M, sum of widths).

A table (:func:`sibling_table`) has a row for each block of columns of y. It says which columns of h = x A^T, which part
of B and which scale belong to it. So the zeros of a block-diagonal B are neither stored nor multiplied, and ranks and
scales may differ. A layer by itself needs no table. A swap to other ranks is another table of the same shape: nothing
is compiled.

x, W and bias have one dtype, and so have A and B: float32, bfloat16 or float16. Other devices than a GPU take float64
too. As in PEFT, x is taken in A's dtype, and h is rounded to it. Sums are float32. scale_i * h B_i^T + bias is rounded
to y's dtype, and so is its sum with x W^T. Products of float32 are as exact as float32, also those of float32 adapters
on a base in half precision, by matrix instructions (:mod:`adaptc.kernels._mixed_dot`). No atomics: the same inputs give
the same bits.

The op is for inference: calls look up what was checked and compiled for their binding. Gradients are those of the
definition in torch ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.kernels._launch import INTERPRETED, BoundKernels, check, check_floats, on_device_of, runs_kernels
from adaptc.kernels._packed_products import (
    COLUMN_BLOCK,
    FEW_ROWS,
    FIELDS,
    PackedLayout,
    launch_few_rows,
    launch_many_rows,
    launch_update,
)
from adaptc.kernels.lora_epilogue import matmul_transposed, reference_lora_down
from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_modes import in_dispatch_mode, is_wrapped_or_dual
from adaptc.torch_typing import custom_op, untyped_library

_LIBRARY = untyped_library.Library("adaptc", "FRAGMENT")
_LIBRARY.define(
    "packed_lora(Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor? table, Tensor scales, int[] widths) -> "
    "Tensor"
)


def packed_lora(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Return y (M, sum of widths) for x (M, K), as the module docstring says.

    W is (sum of widths, K), A (sum of ranks, K), B from :func:`packed_factors`, ``table`` from :func:`sibling_table` or
    None for one layer, and scales (layers,). All tensors but the table have gradients.

    Raises BackendError for shapes, dtypes or devices it is not defined for. It does not check that the ranks in the
    table are those of A and B, which would wait for the device.
    """
    return torch.ops.adaptc.packed_lora(x, W, bias, A, B, table, scales, widths)


class _Plan:
    """Checked tensors and bound kernels, which the calls of a layer with one binding share.

    ``end`` forgets the plan once its B is gone.
    """

    end: Any = None

    def __init__(self, x: Tensor, tensors: tuple[Any, ...], widths: Sequence[int]) -> None:
        W, bias, A, B, table, scales = tensors
        _check(x, W, bias, A, B, table, scales, widths)
        self._tensors, self._address = [None if t is None else ref(t) for t in tensors], W.data_ptr()
        early = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        self.layout = PackedLayout(W, bias, A, widths, early=early)
        # Kernels for few rows read W in rows. cuBLAS reads it as it lies.
        self.most_few_rows = FEW_ROWS if W.is_contiguous() else 0
        if not INTERPRETED and W.shape[0]:
            self.layout.bind = self._bind_kernels(x, tensors, tuple(widths))

    def _bind_kernels(self, x: Tensor, tensors: tuple[Any, ...], widths: tuple[int, ...]) -> BoundKernels:
        """Return the kernels for few rows and for many, compiled, so that no later call or swap compiles any.

        Adapters of every rank share them.
        """
        forms = [None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors]
        key = x.device, x.dtype, x.shape[1], widths, *forms
        bound = _KERNELS.get(key)
        if bound is None:
            bound, row = BoundKernels(), x.new_empty(1, x.shape[1])
            W, bias, down, *rest = tensors
            # A rank of zero would launch no down projection, which the next adapter may need.
            down = down if down.shape[0] else down.new_empty(1, down.shape[1])
            layout = PackedLayout(W, bias, down, widths, bound.without_launches, self.layout.early)
            for launch in (launch_few_rows, launch_update):
                launch(layout, row, W, bias, down, *rest)
            _KERNELS[key] = bound
        return bound

    def fits(self, x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether the plan was made for these tensors, and x is as its W wants it."""
        W = tensors[0]
        if W is None or x.dtype != W.dtype or x.shape[1:] != W.shape[1:] or x.device != W.device:
            return False
        known = all((None if r is None else r()) is t for r, t in zip(self._tensors, tensors, strict=True))
        return known and W.data_ptr() == self._address  # which ``W.data = ...`` changes


#: the bound kernels of layers with the same types and sizes
_KERNELS: dict[tuple[Any, ...], BoundKernels] = {}
#: the plans of layers with their bindings, by the ids of W and B
_PLANS: dict[tuple[int, int], _Plan] = {}


def _find_plan(x: Tensor, tensors: tuple[Any, ...], widths: Sequence[int]) -> _Plan:
    key = id(tensors[0]), id(tensors[3])
    plan = _PLANS.get(key)
    if plan is None or not plan.fits(x, tensors):
        plan = _PLANS[key] = _Plan(x, tensors, widths)
        plan.end = ref(tensors[3], lambda _: _PLANS.pop(key, None))
    return plan


def compute_packed_lora(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Return the op's result without its dispatch, for inference alone."""
    if not runs_kernels(x):
        _check(x, W, bias, A, B, table, scales, widths)
        return reference_packed_lora(x, W, bias, A, B, table, scales, widths)
    plan = _find_plan(x, (W, bias, A, B, table, scales), widths)
    n_rows = x.shape[0]
    if not n_rows or not W.shape[0]:
        return x.new_empty(n_rows, W.shape[0])
    if not A.shape[0]:
        # No down projection is launched then, and a kernel that starts early would read x while it is written.
        return torch.nn.functional.linear(x, W, bias)
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    launch = launch_few_rows if n_rows <= plan.most_few_rows else launch_many_rows
    with on_device_of(x):
        return launch(plan.layout, x, W, bias, A, B, table, scales)


def _fake(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    _check(x, W, bias, A, B, table, scales, widths)
    return x.new_empty((x.shape[0], W.shape[0]))


_LIBRARY.impl("packed_lora", compute_packed_lora, "CompositeExplicitAutograd")
untyped_library.register_fake("adaptc::packed_lora", _fake, lib=_LIBRARY)


def packed_factors(matrices: Sequence[Tensor]) -> Tensor:
    """Return up projections, each (width, rank), in the form that the op takes: (sum of widths times ranks,)."""
    return torch.cat([B.t().reshape(-1) for B in matrices])


def sibling_table(widths: Sequence[int], ranks: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the table (blocks of columns, FIELDS), int64, for layers of these widths and ranks.

    The number of blocks does not depend on the ranks. Raises BackendError unless there is a rank for each width.
    """
    check("sibling_table", len(widths) == len(ranks), "a rank for each width", f"{len(ranks)} for {len(widths)}")
    rows: list[list[int]] = []
    column = h_column = begin = 0
    for layer, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        rows += [
            [column + first, min(COLUMN_BLOCK, width - first), first, width, h_column, rank, begin, layer]
            for first in range(0, width, COLUMN_BLOCK)
        ]
        column, h_column, begin = column + width, h_column + rank, begin + width * rank
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, FIELDS)


def table_of_factors(matrices: Sequence[Tensor]) -> Tensor:
    """Return the :func:`sibling_table` of these up projections, each (width, rank), on the device of the first."""
    widths, ranks = zip(*(B.shape for B in matrices), strict=True)
    return sibling_table(widths, ranks, matrices[0].device)


@custom_op("adaptc::sibling_table", mutates_args=())
def _table_op(matrices: Sequence[Tensor]) -> Tensor:
    return table_of_factors(matrices)


@_table_op.register_fake
def _(matrices: Sequence[Tensor]) -> Tensor:
    blocks = sum(-(-B.shape[0] // COLUMN_BLOCK) for B in matrices)
    return matrices[0].new_empty((blocks, FIELDS), dtype=torch.int64)


#: the table for up projections, each (width, rank), as an op: a graph that has it holds for every rank
sibling_table_op: Any = torch.ops.adaptc.sibling_table.default


def _check(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> None:
    op, n_cols = "packed_lora", sum(widths)
    check(op, x.ndim == 2, "x of shape (M, K)", tuple(x.shape))
    check(op, tuple(W.shape) == (n_cols, x.shape[1]), f"W of shape ({n_cols}, {x.shape[1]})", tuple(W.shape))
    check(op, A.ndim == 2 and A.shape[1] == x.shape[1], f"A of shape (R, {x.shape[1]})", tuple(A.shape))
    check(op, A.is_contiguous(), "a contiguous A", A.stride())
    check(op, B.ndim == 1 and B.is_contiguous(), "a contiguous B of one axis", f"{tuple(B.shape)}, {B.stride()}")
    check(op, W.dtype == x.dtype, f"W of x's type {x.dtype} (cast one of them)", W.dtype)
    check(op, A.dtype == B.dtype, f"B of A's type {A.dtype} (cast one of them)", B.dtype)
    check_floats(op, x=x, W=W, A=A, B=B, **({} if bias is None else {"bias": bias}))
    if bias is not None:
        check(op, tuple(bias.shape) == (n_cols,), f"a bias of shape ({n_cols},)", tuple(bias.shape))
        check(op, bias.dtype == W.dtype, f"a bias of W's type {W.dtype} (cast it)", bias.dtype)
        check(op, bias.is_contiguous(), "a contiguous bias", bias.stride())
    check(op, tuple(scales.shape) == (len(widths),), f"scales of shape ({len(widths)},)", tuple(scales.shape))
    check(op, scales.is_contiguous(), "contiguous scales", scales.stride())
    check(op, scales.device == x.device, f"scales on {x.device}, where the other tensors are", scales.device)
    if table is None:
        check(op, len(widths) == 1, "a table, since there are several layers", "None")
        size = n_cols * A.shape[0]
        check(op, B.shape[0] == size, f"B of {size} elements", B.shape[0])
    else:
        rows = sum(-(-width // COLUMN_BLOCK) for width in widths), FIELDS
        check(op, tuple(table.shape) == rows, f"a table of shape {rows}", tuple(table.shape))
        check(op, table.dtype == torch.int64 and table.is_contiguous(), "a contiguous table of int64", table.dtype)
        check(op, table.device == x.device, f"the table on {x.device}, where the other tensors are", table.device)


def _fields_by_column(table: Tensor, n_cols: int) -> tuple[Tensor, ...]:
    """Return the table's fields for each column of y, each (N,); the third is the column's place in its layer."""
    column = torch.arange(n_cols, device=table.device)
    fields = table[torch.searchsorted(table[:, 0].contiguous(), column, right=True) - 1].unbind(1)
    return *fields[:2], fields[2] + column - fields[0], *fields[3:]


def _scaled_factor(A: Tensor, B: Tensor, table: Tensor | None, scales: Tensor, n_cols: int) -> tuple[Tensor, Tensor]:
    """Return B as a block-diagonal matrix (N, sum of ranks), and the scale of each column of y (N,).

    Neither waits for the device.
    """
    if table is None:
        return B.reshape(A.shape[0], n_cols).t(), scales.expand(n_cols)
    _, _, within, width, h_column, rank, begin, layer = (t[:, None] for t in _fields_by_column(table, n_cols))
    r = torch.arange(A.shape[0], device=table.device) - h_column
    place = torch.where((r >= 0) & (r < rank), begin + r * width + within, B.shape[0])
    return torch.cat([B, B.new_zeros(1)])[place], scales[layer[:, 0]]


def reference_packed_lora(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Return the op's result, with its two roundings to y's dtype, in float32 (float64 for float64)."""
    dense, scale = _scaled_factor(A, B, table, scales, W.shape[0])
    update = scale * matmul_transposed(reference_lora_down(x, A), dense)
    update = (update if bias is None else update + bias).to(W.dtype)
    return (matmul_transposed(x, W) + update).to(W.dtype)


def _differentiable(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    table: Tensor | None,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Return the op's result by torch ops, without copies of W."""
    dense, scale = _scaled_factor(A, B, table, scales, W.shape[0])
    update = scale * F.linear(F.linear(x.to(A.dtype), A), dense)
    return F.linear(x, W, bias) + update.to(x.dtype)


decompose_in_transforms("packed_lora", _differentiable, nondifferentiable=(0, 1, 2, 3, 4, 6))
decompose_in_transforms("sibling_table", table_of_factors)


def packed_lora_direct(*arguments: Any) -> Tensor:
    """Return the op's result, without its dispatch where nothing but values is asked for."""
    if (
        in_dispatch_mode()
        or is_wrapped_or_dual(arguments[0])
        or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments))
    ):
        return torch.ops.adaptc.packed_lora(*arguments)
    return compute_packed_lora(*arguments)
