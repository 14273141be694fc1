"""Kernels of :mod:`adaptc.kernels.packed_lora`: layers with LoRA whose factors were packed once per binding.

For up to 16 rows, two kernels:

    down        parts of h = x A^T, the sum over K split over programs
    few rows    y = x W^T + update, where h is needed only at the end

The first takes a few microseconds, which the second spends reading W. From compute capability 9.0 on, a GPU starts it
before the first has ended (programmatic dependent launch), and the update of more rows likewise. In both, the warps of
a program split the sum over K, by a matmul with a batch axis. Four warps on one tile of 16 rows would otherwise all do
the same.

For more rows h is computed by :mod:`adaptc.kernels.lora_epilogue`, a kernel writes the update alone, and cuBLAS adds
the base's matmul to it in place.

In both cases the update, with the bias, is rounded to y's dtype, and so is the sum of the base's matmul and the update.
A row's result differs only by the order of sums then, whether its batch has 16 rows or 17.

No argument depends on an adapter but the rank's, which the kernels are not specialised on. The same holds for the
number of rows. So neither a swap nor another batch compiles anything.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import is_empty_grid, wrap_triton
from adaptc.kernels._low_rank_tile import AOT_DTYPES, RANK_BLOCK, TORCH_DTYPES, row_of_h, update_tile
from adaptc.kernels._mixed_dot import mixed_dot, plain_dot
from adaptc.kernels.lora_epilogue import aot_down, down_programs, launch_down_parts
from adaptc.torch_modes import in_dispatch_mode

#: the number of rows up to which one kernel reads the base's weight: the fewest that matrix instructions take
FEW_ROWS = 16
#: the columns of y that a row of the table is about
COLUMN_BLOCK = 128
#: the fields of a row of the table, in this order: the first column of y and the number of columns, the first of them
#: within their layer, then the layer's width, first column of h, rank, begin in B, and number
FIELDS = 8
#: the most parts of the sum over K, which one program of the next kernel adds up
MAX_PARTS = 16
#: the number of programs that fill a GPU of about 130 multiprocessors twice
FULL_GRID = 256
#: bytes of W to have under way at any time, for memory of 3.35 TB/s with a latency of 0.7 us
BYTES_UNDER_WAY = 2_350_000
#: the most stages of a program: each but one takes 16 KB of shared memory, of which 8.6 and 8.9 have 99
MAX_STAGES = 6

# A kernel sees only constants of its own module, and of this type.
_FIELDS, _COLUMN_BLOCK = tl.constexpr(FIELDS), tl.constexpr(COLUMN_BLOCK)
_RANK_BLOCK = tl.constexpr(RANK_BLOCK)


@triton.jit(do_not_specialize=["n_rows", "n_ranks", "steps"])
def _few_rows_down_kernel(
    x_ptr, a_ptr, h_ptr, n_rows, n_ranks, K, steps,
    EARLY: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write h[s, m, r] for one block of ranks: the part of x A^T from the s-th ``steps`` of GROUPS * BLOCK_K of k."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    ranks = tl.program_id(0).to(tl.int64) * _RANK_BLOCK + tl.arange(0, _RANK_BLOCK)
    split = tl.program_id(1)
    x_rows = x_ptr + rows[None, :, None] * K
    a_ranks = a_ptr + ranks[None, None, :] * K
    row_ok, rank_ok = (rows < n_rows)[None, :, None], (ranks < n_ranks)[None, None, :]
    groups = tl.arange(0, GROUPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    span = steps * (GROUPS * BLOCK_K)
    acc = tl.zeros((GROUPS, BLOCK_M, _RANK_BLOCK), tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, K), GROUPS * BLOCK_K):
        k = start + groups
        x = tl.load(x_rows + k[:, None, :], mask=row_ok & (k < K)[:, None, :], other=0.0)
        a = tl.load(a_ranks + k[:, :, None], mask=rank_ok & (k < K)[:, :, None], other=0.0)
        acc = mixed_dot(x, a, acc)
    h = h_ptr + (split * n_rows + rows)[:, None] * row_of_h(n_ranks) + ranks[None, :]
    tl.store(h, tl.sum(acc, 0), mask=(rows < n_rows)[:, None])


@triton.jit
def _block_of_table(table_ptr, number, within, n_cols, n_ranks, SINGLE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return what a row of the table says: column of y, columns, width, begin in B, rank, column of h, and layer.

    ``within`` is the place in the block at which a program begins. ALIGNED divides all widths. A SINGLE layer has no
    table.
    """
    if SINGLE:
        first = number.to(tl.int64) * _COLUMN_BLOCK
        n_block = n_cols - first
        width = n_cols.to(tl.int64)
        b_first = first
        rank = n_ranks
        h_first = tl.full((), 0, tl.int64)
        layer = tl.full((), 0, tl.int64)
    else:
        entry = table_ptr + number * _FIELDS
        first = tl.load(entry)
        n_block = tl.load(entry + 1)
        width = tl.load(entry + 3)
        b_first = tl.load(entry + 6) + tl.load(entry + 2)
        rank = tl.load(entry + 5).to(tl.int32)
        h_first = tl.load(entry + 4)
        layer = tl.load(entry + 7)
        if ALIGNED >= 16:
            first = tl.multiple_of(first, 16)
            n_block = tl.multiple_of(n_block, 16)
            width = tl.multiple_of(width, 16)
            b_first = tl.multiple_of(b_first, 16)
        if ALIGNED == _COLUMN_BLOCK:
            # Known before the table is read, so that the loads of W need not wait for it.
            first = number.to(tl.int64) * _COLUMN_BLOCK
            n_block = tl.full((), _COLUMN_BLOCK, tl.int64)
    return first + within, n_block - within, width, b_first + within, rank, h_first, layer


@triton.jit(do_not_specialize=["n_rows", "n_parts", "n_ranks"])
def _few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, h_ptr, b_ptr, table_ptr, scales_ptr, y_ptr, n_rows, n_cols, K, n_parts, n_ranks,
    EARLY: tl.constexpr, HAS_BIAS: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write y for all rows and BLOCK_N columns."""
    share: tl.constexpr = _COLUMN_BLOCK // BLOCK_N
    pid = tl.program_id(0)
    first, n_block, width, b_first, rank, h_first, layer = _block_of_table(
        table_ptr, pid // share, (pid % share) * BLOCK_N, n_cols, n_ranks, SINGLE, ALIGNED
    )
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    within = tl.arange(0, BLOCK_N).to(tl.int64)
    cols = first + within
    col_ok = within < n_block
    x_rows = x_ptr + rows[None, :, None] * K
    w_cols = w_ptr + cols[None, None, :] * K
    groups = tl.arange(0, GROUPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((GROUPS, BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, GROUPS * BLOCK_K):
        k = start + groups
        x = tl.load(x_rows + k[:, None, :], mask=(rows < n_rows)[None, :, None] & (k < K)[:, None, :], other=0.0)
        w = tl.load(w_cols + k[:, :, None], mask=col_ok[None, None, :] & (k < K)[:, :, None], other=0.0)
        acc = plain_dot(x, w, acc)
    scale = tl.load(scales_ptr + layer).to(tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    h_row = row_of_h(n_ranks)
    update = update_tile(
        h_ptr + h_first, b_ptr + b_first, scale, bias, rows, within, n_rows, n_block, width, rank, n_parts,
        n_rows * h_row, h_row, EXACT, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    y = tl.sum(acc, 0) + update.to(dtype).to(tl.float32)
    tl.store(
        y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(dtype), mask=(rows < n_rows)[:, None] & col_ok[None, :]
    )


@triton.jit(do_not_specialize=["n_rows", "n_parts", "n_ranks"])
def _update_kernel(
    bias_ptr, h_ptr, b_ptr, table_ptr, scales_ptr, y_ptr, n_rows, n_cols, n_parts, n_ranks,
    EARLY: tl.constexpr, HAS_BIAS: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write scale * h B^T + bias for a block of rows and columns. Neighbours share rows of h, and write in order."""
    first, n_block, width, b_first, rank, h_first, layer = _block_of_table(
        table_ptr, tl.program_id(0), 0, n_cols, n_ranks, SINGLE, ALIGNED
    )
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = tl.arange(0, BLOCK_N).to(tl.int64)
    cols = first + within
    col_ok = within < n_block
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + layer).to(tl.float32)
    h_row = row_of_h(n_ranks)
    part_size = n_rows.to(tl.int64) * h_row
    if EARLY:
        tl.extra.cuda.gdc_wait()
    update = update_tile(
        h_ptr + h_first, b_ptr + b_first, scale, bias, rows, within, n_rows, n_block, width, rank, n_parts, part_size,
        h_row, EXACT, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    y = y_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(y, update.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & col_ok[None, :])


class FewRows(NamedTuple):
    """The options of the kernel that writes y for few rows, besides its arguments; the one of h has some of them."""

    GROUPS: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_stages: int
    num_warps: int = 4
    #: parts of h that are loaded together
    PARTS: int = 8

    @property
    def bytes_of_step(self) -> int:
        """Return the bytes of W in half precision that one program reads in a step of the sum over K."""
        return 2 * self.GROUPS * self.BLOCK_K * self.BLOCK_N

    @property
    def for_h(self) -> dict[str, int]:
        """Return the options of the kernel that computes h."""
        # A program of it has few steps, and must leave shared memory to the programs that start early.
        options = self._asdict() | {"num_stages": min(self.num_stages, 3)}
        return {n: v for n, v in options.items() if n not in ("BLOCK_N", "PARTS")}


class ManyRows(NamedTuple):
    """The options of the kernel that writes updates, besides its arguments."""

    PARTS: int
    BLOCK_M: int
    BLOCK_N: int = COLUMN_BLOCK
    num_warps: int = 8


def few_rows_blocks(base: torch.dtype, n_cols: Any) -> FewRows:
    """Return the blocks for a base of this dtype: they depend on the layer alone, and on no adapter."""
    # Exact float32 products are made outside the tensor cores, and hold their operands in registers: small tiles.
    if base == torch.float32:
        return FewRows(2, FEW_ROWS, 16, 16, num_stages=2)
    # Narrow enough for two programs on each multiprocessor.
    narrow = isinstance(n_cols, int) and n_cols <= 8192
    blocks = FewRows(4, FEW_ROWS, 16 if narrow else 32, 64, num_stages=3)
    if not narrow or n_cols > 2048:
        return blocks
    # A layer too narrow for the whole GPU is read as fast where its few programs load more steps ahead.
    programs = max(triton.cdiv(n_cols, blocks.BLOCK_N), 1)
    ahead = triton.cdiv(BYTES_UNDER_WAY, programs * blocks.bytes_of_step)
    return FewRows(*blocks[:4], num_stages=min(max(ahead + 1, 3), MAX_STAGES))


def update_blocks(base: torch.dtype) -> ManyRows:
    """Return the blocks for a base of this dtype."""
    return ManyRows(PARTS=2, BLOCK_M=32 if base == torch.float32 else 64)


def split_of_few_rows(K: Any, n_ranks: Any, blocks: FewRows) -> tuple[Any, Any]:
    """Return the number of parts of the sum over K, and the steps that a program makes in each.

    More parts end earlier, but each program of the next kernel adds all of them up. A symbolic rank counts as small: it
    must not become a constant of compiled code.
    """
    steps = triton.cdiv(K, blocks.GROUPS * blocks.BLOCK_K)
    tiles = max(triton.cdiv(n_ranks, RANK_BLOCK), 1) if isinstance(n_ranks, int) else 1
    parts = min(max(FULL_GRID // 4 // tiles, 4), MAX_PARTS)
    each = triton.cdiv(steps, parts)
    return (max(triton.cdiv(steps, max(each, 1)), 1) if isinstance(K, int) else parts), each


def column_alignment(widths: Sequence[Any]) -> int:
    """Return the largest of 1, 16 and COLUMN_BLOCK that is known to divide all widths."""
    known = all(isinstance(width, int) for width in widths)
    return next(n for n in (COLUMN_BLOCK, 16, 1) if n == 1 or (known and all(width % n == 0 for width in widths)))


class PackedLayout:
    """The sizes and options, but no tensors, that all launches for one layer, or one group of siblings, share.

    ``bind`` gives for a kernel what is called as ``bound[grid](*arguments, **options)``. None is for torch to trace.
    ``early`` lets a kernel start before the one in front of it has ended.
    """

    def __init__(
        self, W: Tensor, bias: Tensor | None, A: Tensor, widths: Sequence[int], bind: Any = None, early: bool = False
    ) -> None:
        (self.n_cols, self.K), self.n_ranks = W.shape, A.shape[0]
        self.bind, self.early = bind, early
        shared = {"HAS_BIAS": bias is not None, "SINGLE": len(widths) == 1, "ALIGNED": column_alignment(widths)}
        shared["EXACT"] = W.dtype == torch.float32
        blocks, many = few_rows_blocks(W.dtype, self.n_cols), update_blocks(W.dtype)
        self.n_blocks = sum(triton.cdiv(width, COLUMN_BLOCK) for width in widths)
        self.few_grid = self.n_blocks * (COLUMN_BLOCK // blocks.BLOCK_N), 1, 1
        self.parts, self.steps = split_of_few_rows(self.K, self.n_ranks, blocks)
        self.down_grid = triton.cdiv(self.n_ranks, RANK_BLOCK), self.parts, 1
        self.down_options = {"EARLY": early, **blocks.for_h}
        shared |= {"EARLY": early} | ({"launch_pdl": True} if early else {})
        self.few_options, self.many_options = {**shared, **blocks._asdict()}, {**shared, **many._asdict()}
        self.many_rows = many.BLOCK_M
        self.down_programs = down_programs(self.K)
        #: numbers in a row of h: whole blocks
        self.h_row = triton.cdiv(self.n_ranks, RANK_BLOCK) * RANK_BLOCK


def launch_few_rows(
    layout: PackedLayout, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, table: Tensor | None,
    scales: Tensor,
) -> Tensor:  # fmt: skip
    """Return y for at most FEW_ROWS rows. x, W and A are contiguous."""
    s, n_rows, bind = layout, x.shape[0], layout.bind
    y = x.new_empty((n_rows, s.n_cols))
    h = x.new_empty((s.parts, n_rows, s.h_row), dtype=torch.float32)
    if not is_empty_grid(s.n_ranks):
        down = wrap_triton(_few_rows_down_kernel) if bind is None else bind(_few_rows_down_kernel)
        down[s.down_grid](x, A, h, n_rows, s.n_ranks, s.K, s.steps, **s.down_options)
    few = wrap_triton(_few_rows_kernel) if bind is None else bind(_few_rows_kernel)
    few[s.few_grid](
        x, W, W if bias is None else bias, h, B, scales if table is None else table, scales, y,
        n_rows, s.n_cols, s.K, s.parts, s.n_ranks, **s.few_options,
    )  # fmt: skip
    return y


def launch_update(
    layout: PackedLayout, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, table: Tensor | None,
    scales: Tensor,
) -> Tensor:  # fmt: skip
    """Return y without x W^T, for any number of rows. x and A are contiguous; of W only the type matters."""
    s, n_rows = layout, x.shape[0]
    h = launch_down_parts(x, A, None, s.h_row, s.down_programs, s.bind, s.early)
    y = x.new_empty((n_rows, s.n_cols))
    update = wrap_triton(_update_kernel) if s.bind is None else s.bind(_update_kernel)
    update[(s.n_blocks, triton.cdiv(n_rows, s.many_rows), 1)](
        W if bias is None else bias, h, B, scales if table is None else table, scales, y,
        n_rows, s.n_cols, h.shape[0], s.n_ranks, **s.many_options,
    )  # fmt: skip
    return y


def launch_many_rows(
    layout: PackedLayout, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, table: Tensor | None,
    scales: Tensor,
) -> Tensor:  # fmt: skip
    """Return y for any number of rows. x and A are contiguous."""
    update = launch_update(layout, x, W, bias, A, B, table, scales)
    # A compiler makes a write in place of the sum by itself. For others torch would copy the update first.
    return torch.addmm(update, x, W.t()) if in_dispatch_mode() else update.addmm_(x, W.t())


def _aot_few_rows(base: str, adapter: str, n_cols: int, early: bool) -> list[AotKernel]:
    t = few_rows_blocks(TORCH_DTYPES[base], n_cols)
    name = f"{base}-{adapter}-{n_cols}{'-early' if early else ''}"
    warps, stages = t.num_warps, t.for_h["num_stages"]
    blocks = {n: v for n, v in t._asdict().items() if n.isupper()} | {"EARLY": early}
    pointers = {"x_ptr": base, "a_ptr": adapter, "h_ptr": "fp32"}
    half = base != "fp32"
    down = AotKernel.from_pointers(
        _few_rows_down_kernel, f"few_rows_down-{name}", pointers, (), half or adapter != "fp32", EARLY=early,
        **{n: v for n, v in t.for_h.items() if n.isupper()},
    )  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), base)
    pointers |= {"h_ptr": "fp32", "b_ptr": adapter, "table_ptr": "i64", "scales_ptr": "fp32"}
    fixed = {"HAS_BIAS": True, "SINGLE": False, "ALIGNED": COLUMN_BLOCK, "EXACT": not half, **blocks}
    layer = AotKernel.from_pointers(_few_rows_kernel, f"few_rows-{name}", pointers, (), half, **fixed)
    layer = replace(layer, num_warps=warps, num_stages=t.num_stages, launch_pdl=early)
    return [replace(down, num_warps=warps, num_stages=stages), layer]


def _aot_update(base: str, adapter: str, early: bool = False) -> AotKernel:
    t = update_blocks(TORCH_DTYPES[base])
    pointers = {"bias_ptr": base, "y_ptr": base, "h_ptr": "fp32", "b_ptr": adapter}
    pointers |= {"table_ptr": "i64", "scales_ptr": "fp32"}
    fixed = {"EARLY": early, "HAS_BIAS": True, "SINGLE": False, "ALIGNED": COLUMN_BLOCK, "EXACT": base == "fp32"}
    name, mma = f"update-{base}-{adapter}{'-early' if early else ''}", (base, adapter) != ("fp32", "fp32")
    made = AotKernel.from_pointers(_update_kernel, name, pointers, (), mma, **fixed, **t._asdict())
    return replace(made, launch_pdl=early)


AOT_KERNELS = [
    *(a for types in AOT_DTYPES for n_cols in (256, 1024, 4096, 14336) for a in _aot_few_rows(*types, n_cols, False)),
    *(_aot_update(*types) for types in AOT_DTYPES),
]
#: as they are launched from compute capability 9.0 on
EARLY_KERNELS = [
    *(a for types in AOT_DTYPES for a in _aot_few_rows(*types, 4096, True)),
    *(make(*types, early=True) for types in AOT_DTYPES for make in (aot_down, _aot_update)),
]
