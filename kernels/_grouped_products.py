"""Kernels of :mod:`adaptc.kernels.grouped_lora`: matmuls of rows with the factors of each row's own adapter.

Rows come in chunks (:mod:`adaptc.kernels._row_chunks`); a program takes one chunk and one block of columns. Sums are
float32. Nothing is added up by atomics: each element of a result has one program that writes it.

The chunks must have at most BLOCK_M rows, and ``starts`` must ascend within the bank. The elements of a row must be
contiguous, while the rows of x, y, h and v may have any stride. The bank and the results are contiguous. In a row of h,
only the columns below the rank of its adapter are written or read.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import is_empty_grid, on_device_of, wrap_triton
from adaptc.kernels._mixed_dot import float32_dot, mixed_dot, plain_dot
from adaptc.kernels._row_chunks import Chunks, adapter_edges


@triton.jit
def _exact_dot(left, right, acc):
    """Return acc + left @ right, whose products are exact to float32 also where the dtypes differ."""
    if left.dtype == right.dtype or right.dtype == tl.float32:
        return mixed_dot(left, right, acc)
    else:
        return plain_dot(left.to(tl.float32), right.to(tl.float32), acc)


@triton.jit
def _dot_float32(left, right, acc, EXACT: tl.constexpr):
    """Return acc + left @ right for ``left`` in float32, with the matrix instructions of ``right``'s type if any.

    Two float32 are multiplied as they are if EXACT, and else in bfloat16 terms.
    """
    if right.dtype == tl.bfloat16:
        high = left.to(tl.bfloat16)
        low = (left - high.to(tl.float32)).to(tl.bfloat16)
        return plain_dot(high, right, plain_dot(low, right, acc))
    elif right.dtype == tl.float16:
        # Not split in two as for bfloat16: h may exceed the range of float16.
        return tl.dot(left, right.to(tl.float32), acc, input_precision="tf32x3")
    elif EXACT:
        return plain_dot(left, right, acc)
    else:
        return float32_dot(left, right, acc)


@triton.jit
def _load_adapter(starts_ptr, adapter, n_adapters, R):
    """Return the first row of an adapter in the bank, its rank, and whether the row's result is defined.

    The rank is at most R, and 0 if there is no such adapter. The result is defined for rows of the base, and for an
    adapter that exists and whose rank is at most R.
    """
    known = (adapter >= 0) & (adapter < n_adapters)
    first = tl.load(starts_ptr + adapter, mask=known, other=0)
    rank = tl.load(starts_ptr + adapter + 1, mask=known, other=0) - first
    return first.to(tl.int64), tl.minimum(rank, R), (adapter < n_adapters) & (rank <= R)


# These change from batch to batch, and with the adapters of a bank. Specialised, they would compile another kernel
# where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T", "R", "n_adapters", "steps"])
def _shrink_kernel(
    x_ptr, bank_ptr, h_ptr, starts_ptr, order_ptr, adapter_ptr, start_ptr, length_ptr,
    T, K, R, n_adapters, x_row, steps,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write h[s, p, r], the part of h[p, r] from the s-th ``steps`` times BLOCK_K, for a chunk and a tile of ranks."""
    c = tl.program_id(0)
    split = tl.program_id(2)
    first, rank, _ = _load_adapter(starts_ptr, tl.load(adapter_ptr + c), n_adapters, R)
    length = tl.load(length_ptr + c)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (length > 0) & (tl.program_id(1) * BLOCK_R < rank):
        m = tl.arange(0, BLOCK_M)
        p = (tl.load(start_ptr + c) + m).to(tl.int64)
        rows = tl.load(order_ptr + p, mask=m < length, other=0).to(tl.int64)
        x_rows = x_ptr + rows[:, None] * x_row
        a_rows = bank_ptr + (first + r)[None, :] * K
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        span = steps * BLOCK_K
        for k0 in range(split * span, tl.minimum(split * span + span, K), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], mask=(m < length)[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_rows + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
            acc = _exact_dot(x, a, acc)
        out = h_ptr + (split.to(tl.int64) * T + p)[:, None] * R + r[None, :]
        tl.store(out, acc, mask=(m < length)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["R", "n_adapters", "h_row"])
def _expand_kernel(
    y_ptr, h_ptr, bank_ptr, out_ptr, starts_ptr, scales_ptr, order_ptr, adapter_ptr, start_ptr, length_ptr,
    N, R, n_adapters, y_row, out_row, h_row,
    IN_PLACE: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write out for the rows of one chunk and one block of columns.

    Rows of the base are copied. IN_PLACE, where out is y, leaves them alone.
    """
    c = tl.program_id(0)
    adapter = tl.load(adapter_ptr + c)
    length = tl.load(length_ptr + c)
    if IN_PLACE:
        length = tl.where(adapter < 0, 0, length)
    if length > 0:
        first, rank, is_defined = _load_adapter(starts_ptr, adapter, n_adapters, R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, BLOCK_M)
        p = (tl.load(start_ptr + c) + m).to(tl.int64)
        rows = tl.load(order_ptr + p, mask=m < length, other=0).to(tl.int64)
        ok = (m < length)[:, None] & (n < N)[None, :]
        # Loaded before the matmul, which then hides the wait for memory.
        y = tl.load(y_ptr + rows[:, None] * y_row + n[None, :], mask=ok, other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            own = r < rank
            h = tl.load(h_ptr + p[:, None] * h_row + r[None, :], mask=(m < length)[:, None] & own[None, :], other=0.0)
            b_mask = own[:, None] & (n < N)[None, :]
            b = tl.load(bank_ptr + (first + r)[:, None] * N + n[None, :], mask=b_mask, other=0.0)
            acc = _dot_float32(h, b, acc, EXACT)
        scale = tl.load(scales_ptr + adapter, mask=(adapter >= 0) & (adapter < n_adapters), other=0.0)
        sums = (y.to(tl.float32) + scale * acc).to(y.dtype)
        # Copied, since y + 0 is +0 where y is -0.
        sums = tl.where(rank > 0, sums, y)
        sums = tl.where(is_defined, sums, float("nan"))
        tl.store(out_ptr + rows[:, None] * out_row + n[None, :], sums.to(y.dtype), mask=ok)


@triton.jit(do_not_specialize=["R", "n_adapters"])
def _outer_kernel(
    h_ptr, v_ptr, out_ptr, starts_ptr, begins_ptr, order_ptr, W, R, n_adapters, h_row, v_row,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one tile of one adapter: sums over all rows of the batch that belong to it, in their order."""
    adapter = tl.program_id(0)
    first, rank, _ = _load_adapter(starts_ptr, adapter, n_adapters, R)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R < rank:
        n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
        end = tl.load(begins_ptr + adapter + 1)
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for p0 in range(tl.load(begins_ptr + adapter), end, BLOCK_M):
            p = p0 + tl.arange(0, BLOCK_M)
            rows = tl.load(order_ptr + p, mask=p < end, other=0).to(tl.int64)
            h_mask = (r < rank)[:, None] & (p < end)[None, :]
            h = tl.load(h_ptr + p.to(tl.int64)[None, :] * h_row + r[:, None], mask=h_mask, other=0.0)
            v_mask = (p < end)[:, None] & (n < W)[None, :]
            v = tl.load(v_ptr + rows[:, None] * v_row + n[None, :], mask=v_mask, other=0.0)
            acc = _dot_float32(h, v, acc, True)
        mask = (r < rank)[:, None] & (n < W)[None, :]
        tl.store(out_ptr + (first + r)[:, None] * W + n[None, :], acc, mask=mask)


def _with_contiguous_rows(t: Tensor) -> Tensor:
    """Return ``t``, copied where the elements of a row are not contiguous; rows may have any stride, also 0."""
    return t if t.stride(1) == 1 else t.contiguous()


def _shrink_blocks(chunk: int, R: Any, exact: bool) -> dict[str, int]:
    """Return the blocks of the shrink kernel.

    ``exact`` is for float32 matmuls. They use no matrix instructions but registers, which hold only small tiles.
    """
    rows = max(16, triton.next_power_of_2(chunk))
    return {"BLOCK_M": rows, "BLOCK_R": _rank_block(R, exact), "BLOCK_K": 32 if exact else 128 if rows < 64 else 64}


def _expand_blocks(chunk: int, exact: bool) -> dict[str, int]:
    """Return the blocks of the expand kernel.

    The tiles of the sums, of y and of out are in registers together, so a tile has about the same size for all chunks.
    """
    rows = max(16, triton.next_power_of_2(chunk))
    return {"BLOCK_M": rows, "BLOCK_R": 16, "BLOCK_N": min(64, 2048 // rows) if exact else min(128, 4096 // rows)}


def _outer_blocks(R: Any, exact: bool) -> dict[str, int]:
    return {"BLOCK_M": 32, "BLOCK_R": _rank_block(R, exact), "BLOCK_N": 64}


def _rank_block(R: Any, exact: bool) -> int:
    return 16 if exact or not isinstance(R, int) or R <= 16 else 32


def _split_count(T: Any, K: Any, rank_tiles: Any, chunk: int, block_k: int) -> int:
    """Return the number of parts of the sum over K, such that a small T fills a GPU of about 130 processors twice.

    A symbolic T may turn out large, and then each part costs memory and time to be added up, so it gets few parts.
    """
    most = min(256 // max(triton.cdiv(T, chunk) * rank_tiles, 1), 16) if isinstance(T, int) else 4
    return max(min(most, K // (4 * block_k)) if isinstance(K, int) else most, 1)


def launch_shrink(x: Tensor, bank: Tensor, starts: Tensor, table: Chunks, chunk: int, R: int) -> Tensor:
    (T, K), n = x.shape, starts.shape[0] - 1
    exact = x.dtype == torch.float32 or bank.dtype not in (x.dtype, torch.float32)
    blocks = _shrink_blocks(chunk, R, exact)
    tiles = triton.cdiv(R, blocks["BLOCK_R"])
    splits = _split_count(T, K, tiles, chunk, blocks["BLOCK_K"])
    steps = triton.cdiv(triton.cdiv(K, splits), blocks["BLOCK_K"])
    h = x.new_empty((splits, T, R), dtype=torch.float32)
    if not is_empty_grid(T, R):
        x = _with_contiguous_rows(x)
        with on_device_of(x):
            wrap_triton(_shrink_kernel)[(table.adapter.shape[0], tiles, splits)](
                x, bank.contiguous(), h, starts, *table, T, K, R, n, x.stride(0), steps, **blocks
            )
    return h.squeeze(0) if splits == 1 else h.sum(0)


def launch_expand(
    y: Tensor,
    h: Tensor,
    bank: Tensor,
    starts: Tensor,
    scales: Tensor,
    table: Chunks,
    chunk: int,
    in_place: bool = False,
) -> Tensor:
    """Return y plus the updates: a new tensor, or y itself, whose rows are contiguous, ``in_place``."""
    (T, N), R, n = y.shape, h.shape[1], starts.shape[0] - 1
    out = y if in_place else y.new_empty((T, N))
    if not is_empty_grid(T, N):
        y, h = _with_contiguous_rows(y), _with_contiguous_rows(h)
        exact = y.dtype == bank.dtype == torch.float32
        blocks = _expand_blocks(chunk, exact) | {"EXACT": exact, "IN_PLACE": in_place}
        with on_device_of(y):
            wrap_triton(_expand_kernel)[(table.adapter.shape[0], triton.cdiv(N, blocks["BLOCK_N"]))](
                y, h, bank.contiguous(), out, starts, scales.contiguous(), *table, N, R, n, y.stride(0), out.stride(0),
                h.stride(0), **blocks, num_stages=2,
            )  # fmt: skip
    return out


def launch_outer(h: Tensor, v: Tensor, starts: Tensor, table: Chunks, n_rows: int) -> Tensor:
    R, W, n = h.shape[1], v.shape[1], starts.shape[0] - 1
    # Rows of the bank that belong to no adapter are not visited.
    out = v.new_zeros((n_rows, W), dtype=torch.float32)
    if not is_empty_grid(n, R, W):
        h, v = _with_contiguous_rows(h), _with_contiguous_rows(v)
        blocks = _outer_blocks(R, v.dtype == torch.float32)
        begins = adapter_edges(table, n)
        with on_device_of(v):
            wrap_triton(_outer_kernel)[(n, triton.cdiv(R, blocks["BLOCK_R"]), triton.cdiv(W, blocks["BLOCK_N"]))](
                h, v, out, starts, begins, table.order, W, R, n, h.stride(0), v.stride(0), **blocks
            )
    return out


def _aot_kernels() -> list[AotKernel]:
    """Return records of each kernel with the blocks for few rows and for many."""
    indices = dict.fromkeys(["starts_ptr", "order_ptr", "adapter_ptr", "start_ptr", "length_ptr", "begins_ptr"], "*i32")
    sizes = dict.fromkeys(
        ["T", "K", "N", "W", "R", "n_adapters", "steps", "x_row", "y_row", "out_row", "h_row", "v_row"], "i32"
    )
    sums = {"h_ptr": "*fp32", "scales_ptr": "*fp32"}

    def record(kernel: Any, name: str, blocks: dict[str, int], mma: bool, **types: str) -> AotKernel:
        known = {**indices, **sizes, **sums, **types, **dict.fromkeys(blocks, "constexpr")}
        stages = 2 if kernel is _expand_kernel else 3
        signature = {n: known[n] for n in kernel.arg_names}
        return AotKernel(kernel, signature, blocks, num_stages=stages, mma=mma, name=name)

    records = []
    for rows, bank in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")):
        exact = rows == "fp32"
        row, matrix = f"*{rows}", f"*{bank}"
        for chunk, R in ((16, 16), (64, 128)):
            name = f"{rows} rows {bank} bank chunk {chunk} rank {R}"
            blocks = _shrink_blocks(chunk, R, exact)
            records.append(record(_shrink_kernel, f"shrink {name}", blocks, not exact, x_ptr=row, bank_ptr=matrix))
            blocks = _expand_blocks(chunk, exact) | {"EXACT": exact, "IN_PLACE": False}
            records.append(
                record(_expand_kernel, f"expand {name}", blocks, not exact, y_ptr=row, bank_ptr=matrix, out_ptr=row)
            )
        if rows == bank:
            blocks = _outer_blocks(128, exact)
            records.append(record(_outer_kernel, f"outer {rows}", blocks, not exact, v_ptr=row, out_ptr="*fp32"))
    return records


AOT_KERNELS = _aot_kernels()
