"""What a run costs: memory at its peak, bytes on disk, seconds of a swap; and the machine that it ran on."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import adaptc

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: swaps of which the median is taken
_SWAPS = 7


def reset_peak() -> None:
    """Begin to follow the peak of memory anew, where the system can: what loading a model takes is not training."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:  # not Linux, or a container that does not allow it; the peak is then that of the whole process
        return


def peak_bytes() -> int:
    """Return the largest resident size of this process, since :func:`reset_peak` where that worked."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        # macOS counts in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def swap_seconds(program: adaptc.AdaptedProgram, adapter: Path) -> float:
    """Return the median time of a swap to an adapter's directory."""
    seconds: list[float] = []
    for _ in range(_SWAPS):
        start = time.perf_counter()
        adaptc.swap(program, adapter)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def file_bytes(adapter: Path) -> int:
    """Return the bytes of an adapter's tensors on disk."""
    return sum(f.stat().st_size for f in adapter.rglob("*.safetensors"))


def machine() -> dict[str, Any]:
    """Return what the process runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
