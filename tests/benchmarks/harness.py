"""Interleaved timing: every candidate once per round, medians over rounds, ratios to a named baseline.

Interleaving makes slow drifts of the machine (heat, other processes) hit all candidates alike; a median forgets spikes.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    work: str
    candidate: str
    milliseconds: float
    ratio: float
    rounds: int


def interleave(
    work: str, candidates: Mapping[str, Callable[[], object]], baseline: str, rounds: int = 15, warmup: int = 2
) -> list[Row]:
    """Time each candidate ``rounds`` times, in turn; rows in the order given."""
    for run in candidates.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    return [Row(work, name, ms, ms / medians[baseline], rounds) for name, ms in medians.items()]


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| work | candidate | median ms | ratio |", "|---|---|---:|---:|"]
    last = ""
    for r in rows:
        lines.append(f"| {r.work if r.work != last else ''} | {r.candidate} | {r.milliseconds:.3f} | {r.ratio:.2f} |")
        last = r.work
    return "\n".join(lines)


def machine() -> str:
    """What the numbers were measured on."""
    import peft
    import transformers

    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    return (
        f"{names[0] if names else cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    )
