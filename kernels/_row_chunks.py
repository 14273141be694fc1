"""Cut the rows of a batch with per-row adapters into chunks of one adapter each, and compute reference matmuls on them.

A kernel program works on one chunk, so its rows share the adapter's factors. A group of any length is spread over many
programs. Chunks are the segments of Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285), cut evenly.

Everything here is torch ops on whole tensors, with shapes that follow from shapes alone. So nothing waits for the
device, and a captured CUDA graph can be replayed with another assignment of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptc.errors import BackendError


class Chunks(NamedTuple):
    """The chunks of a batch of T rows, in ascending order of adapters; all int32."""

    #: (T,): the row at each position once rows are sorted by adapter; equal adapters keep their order
    order: Tensor
    #: (C,): the adapter of each chunk, ascending: -1 for rows of the base, n for rows of adapters that do not exist
    adapter: Tensor
    #: (C,): the position each chunk starts at
    start: Tensor
    #: (C,): the rows of each chunk. Chunks that are not needed come last, with length 0, adapter n and start T.
    length: Tensor


def chunk_count(n_rows: int, n_adapters: int, chunk: int) -> int:
    """Return C, the number of chunks that any assignment of rows can need.

    Cutting T rows of G groups needs at most ceil(T / chunk) + G - 1 chunks. The groups are the adapters, the rows of
    the base, and the rows whose adapter does not exist.
    """
    return -(-n_rows // chunk) + n_adapters + 1


def rows_per_chunk(n_rows: int | torch.SymInt) -> int:
    """Return the size of the chunks that a batch is cut into: small for few rows, so that there are programs enough.

    A symbolic number of rows always gets the same size, so that another batch compiles nothing anew.
    """
    # Under torch.compile, isinstance says that a symbolic size is an int.
    if torch.compiler.is_compiling() or not isinstance(n_rows, int):
        return 32
    return 16 if n_rows <= 512 else 32 if n_rows <= 2048 else 64


def cut_into_chunks(index: Tensor, n_adapters: int, chunk: int) -> Chunks:
    """Cut the rows into chunks of one adapter and at most ``chunk`` rows each.

    ``index`` is (T,), int32 or int64: the adapter of each row, or -1 for the base. Any other number outside of
    0 to ``n_adapters`` - 1 stands for an adapter that does not exist. Raises BackendError for another shape or dtype.
    """
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise BackendError(f"index: expected (rows,) of int32 or int64, found {tuple(index.shape)} of {index.dtype}.")
    if chunk < 1:
        raise BackendError(f"chunk: expected at least 1 row, found {chunk}.")
    n_rows, device = index.shape[0], index.device
    known = (index >= -1) & (index < n_adapters)
    ordered, order = torch.sort(torch.where(known, index, n_adapters), stable=True)

    def arange(start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=device, dtype=index.dtype)

    # The last edge begins an empty group, to which the spare chunks belong.
    group_starts = torch.searchsorted(ordered, arange(-1, n_adapters + 2))
    counts = torch.diff(group_starts, append=group_starts[-1:])
    used = (counts + (chunk - 1)) // chunk
    ends = used.cumsum(0)
    number = torch.arange(chunk_count(n_rows, n_adapters, chunk), device=device)
    group = torch.searchsorted(ends, number, right=True).clamp(max=n_adapters + 2)
    offset = (number - (ends - used)[group]) * chunk
    spare = counts[group] == 0
    start = torch.where(spare, n_rows, group_starts[group] + offset)
    length = torch.where(spare, 0, (counts[group] - offset).clamp(max=chunk))
    adapter = (group - 1).clamp(max=n_adapters)
    return Chunks(order.int(), adapter.int(), start.int(), length.int())


def adapter_edges(table: Chunks, n_adapters: int) -> Tensor:
    """Return (n + 1,) int32: the positions at which the rows of each adapter begin, and where those of the last end."""
    wanted = torch.arange(n_adapters + 1, device=table.adapter.device, dtype=torch.int32)
    starts = torch.cat([table.start, table.start.new_full((1,), table.order.shape[0])])
    return starts[torch.searchsorted(table.adapter, wanted)]


def position_adapters(table: Chunks) -> Tensor:
    """Return (T,) int32: the adapter of the row at each position."""
    position = torch.arange(table.order.shape[0], device=table.order.device, dtype=torch.int32)
    return table.adapter[torch.searchsorted(table.start, position, right=True) - 1]


def take_per_adapter(values: Tensor, adapter: Tensor) -> Tensor:
    """Return values[adapter], with 0 for the base and for adapters that do not exist.

    ``values`` is (n,), and the result has the shape of ``adapter``, which is any.
    """
    n = values.shape[0]
    known = (adapter >= 0) & (adapter < n)
    return torch.cat([values, values.new_zeros(1)])[torch.where(known, adapter, n)]


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which matmuls of these are summed: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunk_positions(table: Chunks, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the rows of each chunk, (C, chunk), and a mask of those that exist; the others are T."""
    within = torch.arange(chunk, device=table.start.device)
    there = within < table.length[:, None]
    return torch.where(there, table.start[:, None] + within, table.order.shape[0]), there


def _bank_rows(starts: Tensor, table: Chunks, R: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return the bank's rows of each chunk's adapter, (C, R), and a mask of those that exist.

    The others are ``n_rows``, which is past the bank's last row.
    """
    first, rank = (take_per_adapter(v, table.adapter)[:, None] for v in (starts[:-1], torch.diff(starts)))
    column = torch.arange(R, device=starts.device)
    own = column < rank
    return torch.where(own, first + column, n_rows), own


def _take_rows(t: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t[rows] in ``dtype``, with zeros for the row past the last."""
    return torch.cat([t.to(dtype), t.new_zeros(1, t.shape[1], dtype=dtype)])[rows]


def reference_grouped_shrink(x: Tensor, bank: Tensor, starts: Tensor, table: Chunks, chunk: int, R: int) -> Tensor:
    """Return h, (T, R) float32 (float64 for float64 inputs), which is zero beyond the rank of a row's adapter."""
    dtype, T = sum_dtype(x, bank), x.shape[0]
    at, _ = _chunk_positions(table, chunk)
    rows, _ = _bank_rows(starts, table, R, bank.shape[0])
    order = torch.cat([table.order, table.order.new_full((1,), T)])
    h = _take_rows(x, order[at], dtype) @ _take_rows(bank, rows, dtype).mT
    return h.new_zeros(T + 1, R).index_put((at,), h)[:T]


def reference_grouped_expand(
    y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor, table: Chunks, chunk: int
) -> Tensor:
    """Return out, (T, N) of y's dtype: summed in float32 (float64 for float64 inputs), rounded once."""
    dtype, (T, N), n = sum_dtype(y, h, bank), y.shape, starts.shape[0] - 1
    positions, _ = _chunk_positions(table, chunk)
    rows, own = _bank_rows(starts, table, h.shape[1], bank.shape[0])
    order = torch.cat([table.order, table.order.new_full((1,), T)])
    before = _take_rows(y, order[positions], y.dtype)
    product = torch.where(own[:, None], _take_rows(h, positions, dtype), 0) @ _take_rows(bank, rows, dtype)
    after = (before.to(dtype) + take_per_adapter(scales, table.adapter)[:, None, None].to(dtype) * product).to(y.dtype)
    rank = take_per_adapter(torch.diff(starts), table.adapter)
    fits = (table.adapter < n) & (rank <= h.shape[1])
    after = torch.where((rank > 0)[:, None, None], after, before)
    after = torch.where(fits[:, None, None], after, torch.nan)
    return y.new_zeros(T + 1, N).index_put((order[positions],), after)[:T]


def reference_grouped_outer(h: Tensor, v: Tensor, starts: Tensor, table: Chunks, chunk: int, n_rows: int) -> Tensor:
    """Return (n_rows, W) in float32 (float64 for float64 inputs), zero for rows of the bank without an adapter."""
    dtype, T, W = sum_dtype(h, v), h.shape[0], v.shape[1]
    at, _ = _chunk_positions(table, chunk)
    rows, own = _bank_rows(starts, table, h.shape[1], n_rows)
    order = torch.cat([table.order, table.order.new_full((1,), T)])
    sums = torch.where(own[:, None], _take_rows(h, at, dtype), 0).mT @ _take_rows(v, order[at], dtype)
    return sums.new_zeros(n_rows + 1, W).index_add(0, rows.flatten(), sums.flatten(0, 1))[:n_rows]
