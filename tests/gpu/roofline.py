"""What a computation must do, what a GPU can do, and the share of the one in the other. No GPU is needed here.

A kernel can be no faster than its arithmetic at the peak rate, nor than its traffic at the peak bandwidth: the larger
of the two times is the roofline (Williams et al., CACM 52(4), 2009), and its share of the measured time says how much
is left to gain. Bytes are those that must move, each input once and each result once, whatever a candidate moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """``flops``: a multiplication and an addition are two."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def linear_work(rows: int, K: int, N: int, size: int) -> Work:
    """y (rows, N) = x (rows, K) W^T, elements of ``size`` bytes."""
    return Work(size * (rows * K + N * K + rows * N), 2 * rows * K * N)


def adapter_work(rows: int, K: int, N: int, rank: int, size: int, adapters: int = 1) -> Work:
    """What LoRA adds to a layer, x and y being read and written already; of each adapter in use its own factors."""
    return Work(size * adapters * rank * (K + N), 2 * rows * rank * (K + N))


def lora_work(rows: int, K: int, widths: Sequence[int], rank: int, size: int) -> Work:
    """Layers of these widths that read one x, each with an adapter."""
    work = linear_work(rows, K, sum(widths), size)
    for N in widths:
        work += adapter_work(rows, K, N, rank, size)
    return work


def length_work(N: int, K: int, size: int) -> Work:
    """The length of each row of W (N, K), in float32."""
    return Work(size * N * K + 4 * N, 2 * N * K)


def norm_work(N: int, K: int, rank: int, size: int) -> Work:
    """The length of each row of W + s B A."""
    # The product, its multiple and the sum.
    return length_work(N, K, size) + Work(size * rank * (N + K), 2 * N * K * rank + 2 * N * K)


def merge_work(N: int, K: int, rank: int, size: int) -> Work:
    """W += s B A."""
    return Work(size * (2 * N * K + rank * (N + K)), 2 * N * K * rank + 2 * N * K)


@dataclass(frozen=True)
class Peaks:
    """Bytes and floating point operations per second: dense bfloat16 summed in float32, of the matrix units."""

    bandwidth: float
    flops: float
    source: str = "from its data sheet"


#: What a device's name contains, the longer ones before those that they contain -> its data sheet.
TABLE: tuple[tuple[str, Peaks], ...] = (
    ("H100 PCIe", Peaks(2.0e12, 756e12)),
    ("H100 NVL", Peaks(3.9e12, 835e12)),
    ("H100", Peaks(3.35e12, 989e12)),
    ("H200 NVL", Peaks(4.8e12, 835e12)),
    ("H200", Peaks(4.8e12, 989e12)),
    ("A100-SXM4-80GB", Peaks(2.039e12, 312e12)),
    ("A100 80GB PCIe", Peaks(1.935e12, 312e12)),
    ("A100", Peaks(1.555e12, 312e12)),
    ("L40S", Peaks(0.864e12, 362e12)),
    ("RTX 4090 D", Peaks(1.008e12, 147e12)),
    ("RTX 4090", Peaks(1.008e12, 165.2e12)),
)


def known_peaks(name: str) -> Peaks | None:
    """The data sheet of a device by the name that CUDA gives it, None if it is not in the table."""
    return next((peaks for part, peaks in TABLE if part in name), None)


def roofline(work: Work, peaks: Peaks) -> float:
    """The fewest seconds it can take."""
    return max(work.bytes / peaks.bandwidth, work.flops / peaks.flops)


@dataclass(frozen=True)
class Row:
    """One line: ``device_us`` of the GPU alone, ``call_us`` of a call from Python, both in microseconds."""

    kernel: str
    shape: str
    candidate: str
    work: Work
    device_us: float
    call_us: float


def markdown(rows: Sequence[Row], peaks: Peaks) -> str:
    """The rows as a Markdown table; the rates and the share of the roofline are of ``device_us``."""
    lines = [
        "| kernel | shape | candidate | GPU µs | call µs | GB/s | TFLOP/s | roofline |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    last = "", ""
    for r in rows:
        kernel, shape = ("" if (r.kernel, r.shape) == last else text for text in (r.kernel, r.shape))
        seconds = r.device_us * 1e-6
        times = f"{r.device_us:.1f} | {r.call_us:.1f}"
        rates = f"{r.work.bytes / seconds / 1e9:.0f} | {r.work.flops / seconds / 1e12:.1f}"
        share = f"{roofline(r.work, peaks) / seconds:.0%}"
        lines.append(f"| {kernel} | {shape} | {r.candidate} | {times} | {rates} | {share} |")
        last = r.kernel, r.shape
    return "\n".join(lines)
