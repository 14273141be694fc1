"""``python -m tests.gpu.modelled``: how long a layer of Llama-3-8B should take on an H100, over the base alone.

Nothing here is measured. A kernel takes as long as the slowest of what it does: reading and writing memory, reading L2,
multiplying. What is assumed of the GPU stands in :data:`ASSUMED`, and so does what a kernel costs besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptc.kernels import FEW_ROWS
from adaptc.kernels._packed_products import COLUMN_BLOCK, few_rows_blocks, split_of_few_rows
from adaptc.kernels.lora_epilogue import down_blocks, down_programs, split_count

#: (columns of x, widths of the layers that read it) of one layer of the model
GROUPS = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
#: one layer, too narrow for the whole GPU: the keys or the values by themselves
LONE = ((4096, (1024,)),)
Groups = tuple[tuple[int, tuple[int, ...]], ...]
HALF = 2
#: name of a case -> rows, rank, bytes of a number of the adapter, and the ratio modelled for the kernels of version 0.1
CASES = {
    "decode, 1 row, r=16": (1, 16, HALF, 1.30),
    "decode, 1 row, r=64": (1, 64, HALF, 2.2),
    "decode, 1 row, r=16, adapter in float32": (1, 16, 4, 2.4),
    "decode, 16 rows, r=16": (16, 16, HALF, 1.37),
    "prefill, 512 rows, r=16": (512, 16, HALF, 1.13),
    "prefill, 4096 rows, r=16": (4096, 16, HALF, 1.14),
}


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of memory and of L2 that kernels reach, and operations a second of large matmuls in bfloat16.

    ``processor``: bytes a second that one program keeps under way, of which each multiprocessor has one.
    ``latency``: seconds between a load and its data. ``start``: seconds that each kernel of a graph takes besides.
    ``early``: what is left of them for a kernel that starts before the one in front of it has ended. ``update``: what a
    kernel for few rows does after its loop.
    """

    memory: float = 0.9 * 3.35e12
    cache: float = 5.5e12
    matmul: float = 650e12
    processor: float = 50e9
    latency: float = 0.7e-6
    start: float = 1.5e-6
    early: float = 0.8e-6
    update: float = 0.5e-6

    def seconds(self, memory: float, cache: float = 0.0, operations: float = 0.0) -> float:
        """What a kernel takes that moves so many bytes and does so many operations."""
        return max(memory / self.memory, cache / self.cache, operations / self.matmul) + self.start


ASSUMED = Gpu()


def base_seconds(rows: int, gpu: Gpu = ASSUMED, groups: Groups = GROUPS) -> float:
    """All layers, each by a matmul of its own."""
    return sum(
        gpu.seconds(HALF * (rows * K + N * K + rows * N), operations=2 * rows * K * N)
        for K, widths in groups
        for N in widths
    )


def adapted_seconds(rows: int, rank: int, size: int, gpu: Gpu = ASSUMED, groups: Groups = GROUPS) -> float:
    """All layers with adapters, siblings together."""
    seconds = few_rows_seconds if rows <= FEW_ROWS else many_rows_seconds
    return sum(seconds(rows, K, widths, rank, size, gpu) for K, widths in groups)


def few_rows_seconds(rows: int, K: int, widths: tuple[int, ...], rank: int, size: int, gpu: Gpu) -> float:
    N, ranks = sum(widths), rank * len(widths)
    blocks = few_rows_blocks(torch.bfloat16, N)
    parts, _ = split_of_few_rows(K, ranks, blocks)
    programs = N // COLUMN_BLOCK * (COLUMN_BLOCK // blocks.BLOCK_N)
    memory = HALF * (N * K + rows * N) + size * (ranks * K + N * rank)
    # Each program reads all rows of x, and all parts of its layer's h.
    cache = memory + programs * rows * (HALF * K + 4 * parts * rank)
    # No faster than what all programs have under way arrives.
    under_way = programs * (blocks.num_stages - 1) * blocks.bytes_of_step
    return gpu.seconds(memory * max(gpu.memory / (under_way / gpu.latency), 1), cache) + gpu.early + gpu.update


def many_rows_seconds(rows: int, K: int, widths: tuple[int, ...], rank: int, size: int, gpu: Gpu) -> float:
    N, ranks = sum(widths), rank * len(widths)
    blocks = down_blocks(torch.bfloat16, torch.bfloat16)
    tiles = -(-rows // blocks["BLOCK_M"])
    parts = split_count(rows, K, ranks, blocks, down_programs(K))
    h = 4 * parts * rows * ranks
    # Each block of rows reads A.
    each = HALF * rows * K + size * ranks * K * tiles
    down = max(
        gpu.seconds(HALF * rows * K + size * ranks * K + h, cache=each + h),
        each / (tiles * parts) / gpu.processor * -(-tiles * parts // 132) + gpu.start,
    )
    # Each block of columns reads its layer's part of h.
    update = gpu.seconds(HALF * rows * N + size * N * rank, cache=HALF * rows * N + h / len(widths) * N / COLUMN_BLOCK)
    matmul = gpu.seconds(HALF * (rows * K + N * K + 2 * rows * N), operations=2 * rows * K * N)
    # The update starts before the down projection has ended.
    return down + update - gpu.start + gpu.early + matmul


def markdown() -> str:
    """The cases as a Markdown table."""
    lines = ["| case | base | before | now |", "|---|---:|---:|---:|"]
    for name, (rows, rank, size, before) in CASES.items():
        base = base_seconds(rows)
        lines.append(
            f"| {name} | {base * 1e6:.0f} µs | {before:.2f} | {adapted_seconds(rows, rank, size) / base:.2f} |"
        )
    base = base_seconds(1, groups=LONE)
    alone = adapted_seconds(1, 16, HALF, groups=LONE) / base
    lines.append(f"| one layer of 1024 columns, 1 row, r=16 | {base * 1e6:.1f} µs | - | {alone:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
