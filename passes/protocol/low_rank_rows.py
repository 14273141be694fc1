"""Low-rank changes of a layer's output by per-row adapters, as one operator.

    y + sum_k c[row, k] * scale[k] * (x A_k^T) B_k^T

It takes ``x`` (rows * n, *, in) and ``y`` (rows * n, *, out). In their first axis, each row has one stretch of length
``n``. ``A`` is (count, rank, in), ``B`` (count, out, rank), ``scale`` (count,) or (), and ``c`` (rows, count). It
returns a new tensor of the dtype of ``y``.

Two ways compute it, equal up to rounding. The first is one matmul with the factors of all adapters side by side, for
stretches of few positions. The second computes the rows of each adapter alone. There a row of the base costs nothing,
and no row pays for another's adapter. It makes one matmul for each stretch of rows with the same adapter. If most rows
have another adapter than the row before, one batched matmul computes all consecutive rows with one adapter each. Rows
of one position, such as the tokens of packed texts, are gathered: one matmul for each adapter, or for each of its long
runs of rows.

The operator is for any device. Programs that are exported have plain operators instead. Calls of graphs go to
:func:`low_rank_rows_direct` and to :func:`low_rank_rows_in_place`, which writes to ``y`` and returns it.

The second way has a backward of its own, in which the rows of each adapter are alone as well. It reads ``c`` and
``scale`` as Python numbers. Where a derivative needs them, and in transforms of ``torch.func`` and forward mode, the
first way runs, which torch can follow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.op_rules import decompose_in_transforms
from adaptc.torch_modes import has_transform_or_tangent
from adaptc.torch_typing import to_python, untyped_library

#: the most positions of a row, times adapters, at which one matmul with all factors is faster; plain operators are too
MAX_STACKED_POSITIONS = 16
#: the most rows of one position, times adapters, at which it is faster than gathering the rows of each adapter
MAX_STACKED_ROWS = 128
#: the most of such rows at which it is faster for factors in half precision, of any number of adapters
MAX_STACKED_HALF_ROWS = 256
#: the mean length of an adapter's runs of rows from which on a matmul for each run is faster than gathering them
MIN_MEAN_RUN = 16

_LIBRARY = untyped_library.Library("adaptc", "FRAGMENT")
_LIBRARY.define("low_rank_rows(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, Tensor c) -> Tensor")


def low_rank_rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return y + sum_k c[row, k] * scale[k] * (x A_k^T) B_k^T; the module docstring gives shapes and dtypes."""
    return torch.ops.adaptc.low_rank_rows(x, y, A, B, scale, c)


def multiply_or_zero(h: Tensor, mix: Tensor) -> Tensor:
    """Return h * mix, and zero where ``mix`` is zero, so that an adapter's overflow stays in the rows that use it."""
    return (h * mix).masked_fill(mix == 0, 0)


def stacked_matmul(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result by one matmul with the factors of all adapters."""
    h = F.linear(x.to(A.dtype), A.flatten(0, 1))
    each = h.shape[0] // c.shape[0]
    mix = c.to(torch.promote_types(A.dtype, torch.float32)) * scale  # half precision would round c * scale
    mix = mix if each == 1 else mix.repeat_interleave(each, 0)
    h = multiply_or_zero(h.view(*h.shape[:-1], A.shape[0], -1), mix.view(mix.shape[0], *([1] * (h.ndim - 2)), -1, 1))
    h = h.to(A.dtype)
    return (y + F.linear(h.flatten(-2), B.transpose(0, 1).flatten(1))).to(y.dtype)


def matmuls_by_adapter(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result by matmuls for the rows of each adapter alone."""
    wide = torch.promote_types(y.dtype, A.dtype)
    if wide == y.dtype or _rounds_once(c):
        out = y.clone(memory_format=torch.contiguous_format)
    else:
        out = y.to(wide, copy=True, memory_format=torch.contiguous_format)
    _add_by_adapter(x, out, A, B, scale, c)
    return out.to(y.dtype)


def _rounds_once(c: Tensor) -> bool:
    """Return whether no row has two adapters, so that a sum in the narrower dtype is rounded once all the same."""
    return _read_coefficients(c).has_one_at_most


def _add_by_adapter(x: Tensor, out: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> None:
    """Add the adapters' changes to ``out``, which must be contiguous, adapter by adapter.

    Where a row has several adapters, ``out`` must be of the wider dtype.
    """
    rows = c.shape[0]
    x, flat = x.to(A.dtype).reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    positions = flat.shape[0] // rows if rows else 0
    scales = _scale_values(scale)
    if positions == 1:
        _add_by_gathering(x, flat, A, B, scales, _read_coefficients(c).groups)
        return
    uniform_runs, mixed_runs = _read_coefficients(c).runs
    for first, adapters, weights in mixed_runs:
        alphas = [w * scales[k % len(scales)] for k, w in zip(adapters, weights, strict=True)]
        same_alpha = all(w == alphas[0] for w in alphas)
        if not same_alpha and A.dtype.itemsize < 4:  # h * weights would round the weights to half precision
            own = enumerate(zip(adapters, weights, strict=True), first)
            uniform_runs = [*uniform_runs, *((i, i + 1, k, w) for i, (k, w) in own)]
            continue
        last = first + len(adapters)
        h = torch.bmm(
            x[first * positions : last * positions].view(-1, positions, x.shape[-1]), _factors_of(A, adapters).mT
        )
        if not same_alpha:
            h.mul_(torch.tensor(alphas, dtype=h.dtype, device=h.device).view(-1, 1, 1))
        alpha = alphas[0] if same_alpha else 1.0
        target, up = (
            flat[first * positions : last * positions].view(-1, positions, flat.shape[-1]),
            _factors_of(B, adapters).mT,
        )
        if h.dtype == target.dtype:
            target.baddbmm_(h, up, alpha=alpha)
        else:
            target.add_(torch.bmm(h, up), alpha=alpha)
    for first, last, k, weight in uniform_runs:
        rows_of = slice(first * positions, last * positions)
        h = torch.mm(x[rows_of], A[k].t())
        target = flat[rows_of]
        if h.dtype == target.dtype:
            target.addmm_(h, B[k].t(), alpha=weight * scales[k % len(scales)])
        else:
            target.add_(torch.mm(h, B[k].t()), alpha=weight * scales[k % len(scales)])


def _add_by_gathering(
    x: Tensor, flat: Tensor, A: Tensor, B: Tensor, scales: Sequence[float], groups: Sequence[RowGroup]
) -> None:
    """Add the change of each adapter to its rows of ``flat``."""
    for rows, k, weight in groups:
        own = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
        h, up, scale = torch.mm(own, A[k].t()), B[k].t(), scales[k % len(scales)]
        if isinstance(weight, Tensor):  # in the wider dtype, for half precision would round it
            wide = torch.promote_types(h.dtype, flat.dtype)
            change = torch.mm(h, up).to(wide).mul_(weight.to(wide))
        elif isinstance(rows, slice) and h.dtype == flat.dtype:
            flat[rows].addmm_(h, up, alpha=weight * scale)
            continue
        else:
            change, scale = torch.mm(h, up), weight * scale
        if isinstance(rows, slice):
            flat[rows].add_(change, alpha=scale)
        elif change.dtype == flat.dtype:
            flat.index_add_(0, rows, change, alpha=scale)
        else:
            flat.index_copy_(0, rows, flat.index_select(0, rows).add(change, alpha=scale).to(flat.dtype))


def _factors_of(factors: Tensor, adapters: Sequence[int]) -> Tensor:
    """Return the factors of some adapters, as a view if the adapters are consecutive."""
    first = adapters[0]
    if list(adapters) == list(range(first, first + len(adapters))):
        return factors[first : first + len(adapters)]
    return factors[list(adapters)]


def stacks_tokens(rows: int, count: int, dtype: torch.dtype) -> bool:
    """Return whether one matmul with the factors of all ``count`` adapters is faster for rows of one position."""
    return rows * count <= MAX_STACKED_ROWS or (dtype.itemsize < 4 and rows <= MAX_STACKED_HALF_ROWS)


def _prefers_stacked(x: Tensor, A: Tensor, c: Tensor) -> bool:
    """Return whether one matmul with all factors is the better way: few positions, or another device than the CPU."""
    rows, width = c.shape[0], x.shape[-1]
    positions = x.numel() // (rows * width) if rows and width else 0
    if positions == 1:
        return stacks_tokens(rows, c.shape[1], A.dtype) or c.device.type != "cpu"
    return positions * c.shape[1] <= MAX_STACKED_POSITIONS or c.device.type != "cpu"


def _compute(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return (stacked_matmul if _prefers_stacked(x, A, c) else matmuls_by_adapter)(x, y, A, B, scale, c)


def _may_read_values(*tensors: Tensor) -> bool:
    """Return whether ``scale`` and ``c``, the last two tensors, may be read as numbers: no derivative needs them."""
    return not (
        has_transform_or_tangent(*tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors[-2:]))
    )


def _is_recorded(*tensors: Tensor) -> bool:
    """Return whether a backward will want the gradient of one of ``tensors``."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _MatmulsByAdapter(torch.autograd.Function):
    """:func:`matmuls_by_adapter` with gradients of x, y, A and B. It keeps ``x`` and the factors, and computes
    ``x A^T`` again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, scale, c)
        ctx.y_dtype = y.dtype
        return matmuls_by_adapter(x, y, A, B, scale, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, A, B, scale, c = ctx.saved_tensors
        wants, (grad,) = ctx.needs_input_grad, grads
        own = grad.to(ctx.y_dtype) if wants[1] else None
        if torch.is_grad_enabled():  # gradients of gradients follow operators of torch
            leaves = [t for t, wanted in ((x, wants[0]), (A, wants[2]), (B, wants[3])) if wanted]
            change = stacked_matmul(x, torch.zeros_like(grad), A, B, scale, c)
            found = iter(torch.autograd.grad(change, leaves, grad, create_graph=True) if leaves else ())
            dx, dA, dB = (next(found) if wanted else None for wanted in (wants[0], wants[2], wants[3]))
        else:
            dx, dA, dB = _gradients_by_adapter(x, grad, A, B, scale, c)
        return dx, own, dA, dB, None, None


def _gradients_by_adapter(
    x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B, given that of the result; only the rows of each adapter are read for it."""
    rows, scales = c.shape[0], _scale_values(scale)
    by_row = x.to(A.dtype).reshape(rows, -1, x.shape[-1]), grad.to(A.dtype).reshape(rows, -1, grad.shape[-1])
    groups = _read_coefficients(c).groups
    if _are_equal_shares(groups, rows, A.shape[0]):
        wide = torch.promote_types(A.dtype, torch.float32)  # half precision would round the factors
        factors = torch.tensor([w * scales[k % len(scales)] for _, k, w in groups], dtype=wide, device=A.device)
        return _gradients_of_shares(x, *by_row, A, B, factors.view(-1, 1, 1))
    dx, dA, dB = torch.zeros_like(by_row[0]), torch.zeros_like(A), torch.zeros_like(B)
    for place, k, weight in groups:
        own, up = (t[place].flatten(0, 1) for t in by_row)
        factor = weight * scales[k % len(scales)]
        if isinstance(factor, Tensor):
            up = up * factor.to(up).repeat_interleave(by_row[0].shape[1], 0)
        down = torch.mm(up, B[k])
        if not isinstance(factor, Tensor):
            down.mul_(factor)
        dA[k].addmm_(down.t(), own)
        dB[k].addmm_(up.t(), torch.mm(own, A[k].t()), alpha=1.0 if isinstance(factor, Tensor) else factor)
        change = torch.mm(down, A[k]).view(-1, *by_row[0].shape[1:])
        if isinstance(place, slice):
            dx[place].add_(change)
        else:
            dx.index_add_(0, place, change)
    return dx.view(x.shape).to(x.dtype), dA, dB


def _are_equal_shares(groups: Sequence[RowGroup], rows: int, count: int) -> bool:
    """Return whether each of ``count`` adapters has one run of rows, with one weight, all equally long, in order."""
    own = rows // count
    return rows == own * count and [(g.rows, g.adapter) for g in groups if isinstance(g.weight, float)] == [
        (slice(k * own, (k + 1) * own), k) for k in range(count)
    ]


def _gradients_of_shares(
    x: Tensor, by_row: Tensor, grad: Tensor, A: Tensor, B: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`_gradients_by_adapter` by batched matmuls, given the factor (count, 1, 1) of each adapter."""
    count = A.shape[0]
    own, up = by_row.reshape(count, -1, by_row.shape[-1]), grad.reshape(count, -1, grad.shape[-1])
    down, read = torch.bmm(up, B).mul_(factors), torch.bmm(own, A.mT).mul_(factors)
    dx = torch.bmm(down, A).view(x.shape).to(x.dtype)
    return dx, torch.bmm(down.mT, own), torch.bmm(up.mT, read)


def low_rank_rows_direct(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result without its dispatch."""
    if not _may_read_values(x, y, A, B, scale, c):
        return stacked_matmul(x, y, A, B, scale, c)
    if not _is_recorded(x, y, A, B):
        return _compute(x, y, A, B, scale, c)
    if _prefers_stacked(x, A, c):
        return stacked_matmul(x, y, A, B, scale, c)
    function: Any = _MatmulsByAdapter
    return function.apply(x, y, A, B, scale, c)


def low_rank_rows_in_place(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """Return the operator's result, written to the memory of ``y``; a new tensor where a derivative needs both."""
    if not _may_read_values(x, y, A, B, scale, c) or _is_recorded(x, y, A, B):
        return low_rank_rows_direct(x, y, A, B, scale, c)
    is_wide = y.dtype == torch.promote_types(y.dtype, A.dtype)
    if _prefers_stacked(x, A, c) or not y.is_contiguous() or not (is_wide or _rounds_once(c)):
        return y.copy_(_compute(x, y, A, B, scale, c))
    _add_by_adapter(x, y, A, B, scale, c)
    return y


def _fake(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


_LIBRARY.impl("low_rank_rows", _compute, "CompositeExplicitAutograd")
untyped_library.register_fake("adaptc::low_rank_rows", _fake, lib=_LIBRARY)
decompose_in_transforms("low_rank_rows", stacked_matmul, nondifferentiable=range(6))


#: (first row, row after the last, adapter, weight) of consecutive rows with one weight of one adapter
UniformRuns = list[tuple[int, int, int, float]]
#: (first row, the adapter of each row from there, its weight): consecutive rows that have one adapter each
MixedRuns = list[tuple[int, list[int], list[float]]]


class RowGroup(NamedTuple):
    """The rows that have an adapter: consecutive ones as a slice, others as indices (n,); with one weight for all, or
    weights (n, 1)."""

    rows: slice | Tensor
    adapter: int
    weight: float | Tensor


class CoefficientReading:
    """Read the coefficients of a call as numbers, row by row. Each division is made when it is first asked for."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self._rows = rows

    @cached_property
    def runs(self) -> tuple[UniformRuns, MixedRuns]:
        """Return the rows as :func:`divide_rows` divides them."""
        return divide_rows(self._rows)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """Return the rows of each adapter."""
        return group_rows(self._rows)

    @cached_property
    def has_one_at_most(self) -> bool:
        """Return whether no row has two adapters."""
        return all(sum(weight != 0 for weight in row) <= 1 for row in self._rows)


class _LastRead(threading.local):
    """The result of reading the last coefficients, which are the same tensor at all layers of a call."""

    def __init__(self) -> None:
        self.c: Any = None
        self.reading = CoefficientReading([])
        self.version = -1


_LAST_READ = _LastRead()


def _read_coefficients(c: Tensor) -> CoefficientReading:
    """Return the coefficients (rows, count) as numbers, remembered for the last tensor ``c``."""
    if _LAST_READ.c is not None and _LAST_READ.c() is c and _LAST_READ.version == c._version:
        return _LAST_READ.reading
    found = CoefficientReading(to_python(c))
    _LAST_READ.c, _LAST_READ.reading, _LAST_READ.version = ref(c), found, c._version
    return found


def group_rows(rows: Sequence[Sequence[float]]) -> list[RowGroup]:
    """Return the rows of each adapter, given the coefficients (rows, count).

    An adapter whose runs of consecutive rows are long has a group for each run.
    """
    groups: list[RowGroup] = []
    for k in range(len(rows[0]) if rows else 0):
        runs: list[list[int]] = []
        for i, row in enumerate(rows):
            if row[k]:
                if not runs or runs[-1][-1] + 1 != i:
                    runs.append([])
                runs[-1].append(i)
        count = sum(map(len, runs))
        if len(runs) > 1 and count < MIN_MEAN_RUN * len(runs):
            own = [i for run in runs for i in run]
            groups.append(RowGroup(torch.tensor(own), k, _weight_of(rows, own, k)))
        else:
            groups += [RowGroup(slice(run[0], run[-1] + 1), k, _weight_of(rows, run, k)) for run in runs]
    return groups


def _weight_of(rows: Sequence[Sequence[float]], own: Sequence[int], k: int) -> float | Tensor:
    """Return the weight of adapter ``k`` in the rows ``own``; a tensor (n, 1) where it differs."""
    weights = [rows[i][k] for i in own]
    return weights[0] if len({*weights}) == 1 else torch.tensor(weights, dtype=torch.float64)[:, None]


def divide_rows(rows: Sequence[Sequence[float]]) -> tuple[UniformRuns, MixedRuns]:
    """Return the stretches and runs of rows that add each row's adapters once, given the coefficients (rows, count).

    Runs are used only where most stretches would hold a single row.
    """
    uniform_runs: UniformRuns = []
    for k in range(len(rows[0]) if rows else 0):
        start = 0
        for row in range(1, len(rows) + 1):
            if row == len(rows) or rows[row][k] != rows[start][k]:
                if rows[start][k]:
                    uniform_runs.append((start, row, k, rows[start][k]))
                start = row
    single_rows = sum(last - first == 1 for first, last, _, _ in uniform_runs)
    if 2 * single_rows <= len(uniform_runs) or len(uniform_runs) < 2:
        return uniform_runs, []
    mixed_runs: MixedRuns = []
    adapter_of_row = {i: k for i, row in enumerate(rows) if len(k := [j for j, w in enumerate(row) if w]) == 1}
    for i in sorted(adapter_of_row):
        (k,) = adapter_of_row[i]
        if not mixed_runs or mixed_runs[-1][0] + len(mixed_runs[-1][1]) != i:
            mixed_runs.append((i, [], []))
        mixed_runs[-1][1].append(k)
        mixed_runs[-1][2].append(rows[i][k])
    mixed_runs = [run for run in mixed_runs if len(run[1]) > 1]
    rows_in_runs = {i for first, adapters, _ in mixed_runs for i in range(first, first + len(adapters))}
    rest = [(i, i + 1, k, w) for i, row in enumerate(rows) if i not in rows_in_runs for k, w in enumerate(row) if w]
    return rest, mixed_runs


def _scale_values(scale: Tensor) -> list[float]:
    return to_python(scale) if scale.ndim else [float(scale)]
