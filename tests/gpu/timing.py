"""How long the GPU takes, and how long a call takes; and the peaks that a GPU reaches.

A layer of a model finds its weights in memory and not in the L2 cache, and so must a layer that is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tests.gpu.roofline import Peaks

T = TypeVar("T")
ROUNDS = 40
#: more than the L2 cache of any GPU in the table of peaks
LARGEST_CACHE = 72 * 2**20
MOST_COPIES = 16


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


def copies_beyond_cache(bytes_of_one: int) -> int:
    """How many copies of a case one graph takes in turn, so that each finds its weights in memory and not in L2."""
    return min(max(-(-2 * LARGEST_CACHE // max(bytes_of_one, 1)), 2), MOST_COPIES)


def device_microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """The median over replays of one graph with all ``runs``, divided by them: without what Python and launches take.

    The runs are of copies of one case. Their memory together is larger than L2. Before each replay other memory is
    read, for cases that are too small for that: to write it would leave L2 full of what is to be written back.
    """
    # The result is held until the end, as its memory is the graph's.
    graph, out = captured(lambda: [run() for run in runs])
    other = torch.empty(4 * LARGEST_CACHE, dtype=torch.int32, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for _ in range(3):
        graph.replay()
    for start, end in events:
        other.sum()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del out
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(runs)


def call_microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """The median over calls from Python, launches and all: where these take longer than the GPU, it waits."""
    from triton.testing import do_bench

    def all_runs() -> None:
        for run in runs:
            run()

    return float(do_bench(all_runs, warmup=10, rep=40, return_mode="median")) * 1e3 / len(runs)  # type: ignore[arg-type]


def cpu_microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """Of one call where there is no GPU: no measurement, a sign that it ran."""
    start = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - start) * 1e6 / len(runs)


def measured_peaks() -> Peaks:
    """What this GPU reaches: copying 1 GiB, and multiplying 8192 x 8192 matrices of normal numbers."""
    size, n = 2**30, 8192
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    copying = call_microseconds([lambda: target.copy_(source)]) * 1e-6
    left, right = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product = call_microseconds([lambda: left @ right]) * 1e-6
    return Peaks(2 * size / copying, 2 * n**3 / product, "measured here")
