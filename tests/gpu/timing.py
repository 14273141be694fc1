"""How long the GPU takes, and how long a call takes; and the peaks of a GPU that no table knows.

Between runs the L2 cache is filled with something else: a layer of a model finds its weights in memory, not there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from tests.gpu.roofline import Peaks

T = TypeVar("T")
ROUNDS = 40
#: more than any GPU's L2 cache
FLUSHED = 256 * 2**20


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A call as a CUDA graph, and the result that a replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What is compiled, loaded or allocated once is none of a graph's business, nor allowed in a capture.
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def device_microseconds(run: Callable[[], object]) -> float:
    """The median over replays of one run as a CUDA graph: without what Python and the launches take."""
    # The result is held until the end, as its memory is the graph's.
    graph, out = captured(run)
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for _ in range(3):
        graph.replay()
    for start, end in events:
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del out
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def call_microseconds(run: Callable[[], object]) -> float:
    """The median over calls from Python, launches and all: where these take longer than the GPU, it waits."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median")) * 1e3  # type: ignore[arg-type]


def cpu_microseconds(run: Callable[[], object]) -> float:
    """Of one call where there is no GPU: no measurement, a sign that it ran."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def measured_peaks() -> Peaks:
    """What this GPU reaches: copying 1 GiB, and multiplying 8192 x 8192 matrices of normal numbers."""
    size, n = 2**30, 8192
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    copying = call_microseconds(lambda: target.copy_(source)) * 1e-6
    left, right = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product = call_microseconds(lambda: left @ right) * 1e-6
    return Peaks(2 * size / copying, 2 * n**3 / product, "measured here")
