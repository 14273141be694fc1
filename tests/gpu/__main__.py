"""``python -m tests.gpu [--dry] [--only kernels|model] [--minutes 7]``: all tables, in Markdown, on standard output.

``--dry`` runs everything once, at tiny sizes on the CPU. The exit status is 1 if a case failed, or was left out since
the minutes were over.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from itertools import groupby

import torch

from tests.benchmarks import harness
from tests.benchmarks.model import RANK, smollm2
from tests.gpu import bench, roofline, whole_model
from tests.gpu.roofline import Peaks
from tests.gpu.suite import FULL, TINY, Maker
from tests.gpu.timing import measured_peaks
from tests.gpu.tiny import llama_3_8b, tiny_llama

#: of no device: shares of it mean nothing, and are seen to be computed
NO_DEVICE = Peaks(1e9, 1e9, "made up")


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    options.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: a check, no measurement")
    options.add_argument("--only", choices=["kernels", "model"], help="one part of the tables")
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no other case after so many minutes")
    given = options.parse_args(argv)
    if not given.dry and not torch.cuda.is_available():
        print("no CUDA GPU: torch.cuda.is_available() is False (--dry runs the code on the CPU)", file=sys.stderr)
        return 1
    device, start = torch.device("cpu" if given.dry else "cuda"), time.perf_counter()
    failures: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, about versions and devices
        measured = NO_DEVICE if given.dry else measured_peaks()
        sheet = None if given.dry else roofline.known_peaks(torch.cuda.get_device_name())
        ceilings = [_ceiling(p) for p in (sheet, measured) if p is not None]
        print(_machine(device), "", *ceilings, "", sep="\n", flush=True)
        end = start + 60 * given.minutes
        if given.only != "model":
            failures += _kernels(device, sheet or measured, given.dry, end)
        if given.only != "kernels":
            failures += _model(device, given.dry, end)
    print(f"{time.perf_counter() - start:.0f} s in all.")
    for text in failures:
        print(f"\nFAILED {text}", file=sys.stderr)
    return bool(failures)


def _kernels(device: torch.device, peaks: Peaks, dry: bool, end: float) -> list[str]:
    sizes = TINY if dry else FULL
    maker = Maker(sizes, device, bench.compile_with("eager" if dry else "inductor"))
    print(f"## Kernels: {str(sizes.dtype).removeprefix('torch.')}, layers of K={sizes.K}\n")
    failures: list[str] = []
    # A table for each, printed when it is done: a run may be cut off.
    for _, cases in groupby(maker.cases(), lambda case: case.kernel):
        rows, failed = bench.run(cases, device, sizes.dtype, end - time.perf_counter())
        failures += failed
        print(roofline.markdown(rows, peaks), "\n", flush=True)
    return failures


def _model(device: torch.device, dry: bool, end: float) -> list[str]:
    compiled = bench.compile_with("eager" if dry else "inductor")
    dtype = torch.float32 if dry else torch.bfloat16
    long = 9 if dry else 512
    failures: list[str] = []
    for name, build, works, captured in (
        ("a tiny llama" if dry else "SmolLM2-135M", (lambda: tiny_llama(1)) if dry else smollm2,
         {"decode 1x1": (1, 1), f"prefill 1x{long}": (1, long)}, False),
        ("a tiny llama, captured" if dry else "Llama-3-8B of random weights, each call a CUDA graph",
         (lambda: tiny_llama(2)) if dry else llama_3_8b,
         {"decode 1x1": (1, 1), "decode 16x1": (16, 1), f"prefill 1x{long}": (1, long), f"prefill 8x{long}": (8, long)},
         True),
    ):  # fmt: skip
        if time.perf_counter() > end:
            failures.append(f"{name}: left out, as the time was over")
            continue
        try:
            result = whole_model.run(build(), device, dtype, works, 1 if dry else 25, compiled, captured)
        except Exception:
            failures.append(f"{name}:\n{traceback.format_exc()}")
            continue
        print(f"## {name}: {str(dtype).removeprefix('torch.')}, rank {RANK} on all linear layers\n")
        print(harness.markdown(result.rows), "\n")
        swaps = ", ".join(f"{ms:.2f} ms to rank {rank}" for rank, ms in result.swaps)
        print(f"Swaps with the first call after each: {swaps}.\n", flush=True)
    return failures


def _ceiling(peaks: Peaks) -> str:
    return f"The roofline: {peaks.bandwidth / 1e12:.3f} TB/s and {peaks.flops / 1e12:.3f} TFLOP/s, {peaks.source}."


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU, dry: times mean nothing"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"Measured on {name}; Python {platform.python_version()}, torch {torch.__version__}{cuda}."


if __name__ == "__main__":
    sys.exit(main())
