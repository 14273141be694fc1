"""Requests that come at times of their own, not when others end: an open loop, at a share of what can be served.

Requests come by a Poisson process for a while, each with one of the adapters or none, and an adapter is replaced every
few seconds. Reported are the times to the first token and between tokens, and what a replacement cost: how much longer
the gap between tokens was in which it fell than gaps are at the 99th percentile.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.serving.work import NEW, greedy, names, prompts

#: seconds between two replacements of an adapter
REPLACE_EVERY = 5.0


@dataclass
class Load:
    """What was seen in one run: times in seconds; ``first`` to the first token, ``gaps`` between tokens."""

    rate: float
    seconds: float
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    #: gaps in which an adapter was replaced
    gaps_of_replacements: list[float] = field(default_factory=list)
    replacements: list[float] = field(default_factory=list)
    tokens: int = 0

    def table(self) -> str:
        lines = ["| ms | p50 | p99 | most |", "|---|---:|---:|---:|"]
        rows = {
            "to the first token": self.first,
            "between tokens": self.gaps,
            "between tokens, while an adapter was replaced": self.gaps_of_replacements,
            "to replace an adapter": self.replacements,
        }
        lines += [f"| {what} | {percentiles(times)} |" for what, times in rows.items() if len(times) > 1]
        rate = f"{len(self.first)} requests, {self.rate:.2f} a second, {self.tokens / self.seconds:.1f} tokens a second"
        return "\n".join([rate, "", *lines])


def percentiles(times: Sequence[float]) -> str:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return f"{cuts[49] * 1e3:.0f} | {cuts[98] * 1e3:.0f} | {max(times) * 1e3:.0f}"


def run_open_loop(serving: Any, adapters: dict[str, Path], rate: float, seconds: float) -> Load:
    """Ask ``rate`` requests a second for ``seconds``, and wait for all answers."""
    texts, chosen, draw = prompts(), names(), random.Random(0)
    load, results, arrivals = Load(rate, seconds), {}, []
    at = draw.expovariate(rate)
    while at < seconds:
        arrivals.append(at)
        at += draw.expovariate(rate)
    manager = serving.init_continuous_batching(generation_config=greedy(serving))
    manager.start()
    start, done = time.perf_counter(), threading.Event()
    moments: list[tuple[float, float]] = []

    def replace() -> None:
        paths = list(adapters.values())
        while not done.wait(REPLACE_EVERY):
            began = time.perf_counter()
            serving.bank.replace("a0", str(paths[len(moments) % len(paths)]))
            moments.append((began, time.perf_counter()))

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        for i, moment in enumerate(arrivals):
            time.sleep(max(0.0, start + moment - time.perf_counter()))
            options: Any = {"adapter": chosen[i % len(chosen)], "max_new_tokens": NEW, "record_timestamps": True}
            manager.add_request(texts[i % len(texts)], **options)
        while len(results) < len(arrivals):
            out = manager.get_result(timeout=1)
            if out is not None and out.is_finished():
                results[out.request_id] = out
    finally:
        done.set()
        replacing.join()
        manager.stop(block=True)
    for out in results.values():
        load.first.append(out.timestamps[0] - out.created_time)
        load.tokens += len(out.timestamps)
        for before, after in zip(out.timestamps, out.timestamps[1:], strict=False):
            hit = any(began < after and before < ended for began, ended in moments)
            (load.gaps_of_replacements if hit else load.gaps).append(after - before)
    load.seconds = time.perf_counter() - start
    load.replacements = [ended - began for began, ended in moments]
    return load
