"""Runs the kernels' cases: checks that candidates agree, times them, and goes on where one case fails."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tests.gpu.roofline import Row
from tests.gpu.suite import Candidate, Case, Compile, Output
from tests.gpu.timing import call_microseconds, copies_beyond_cache, cpu_microseconds, device_microseconds

#: what outputs may differ by, relative to their norm
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compile_with(backend: str) -> Compile:
    """torch.compile for the sizes at hand, which is what it is fastest for."""
    return lambda f: torch.compile(f, dynamic=False, backend=backend)


def flat(out: Output) -> Tensor:
    return torch.cat([t.double().flatten() for t in ([out] if isinstance(out, Tensor) else out)])


def check_agreement(candidates: Sequence[Candidate], dtype: torch.dtype) -> None:
    """Raises AssertionError unless all that compute the adapter too give the same, up to rounding."""
    outputs = {c.name: flat(c.run()) for c in candidates if c.whole}
    (first, expected), *others = outputs.items()
    for name, found in others:
        apart = float((found - expected).norm() / expected.norm())
        # Not `apart > allowed`, which a NaN is not.
        if not apart <= ALLOWED[dtype]:
            raise AssertionError(f"{name} differs from {first} by {apart:.1e} of the norm")


Clock = Callable[[Sequence[Callable[[], object]]], float]


def run_case(case: Case, dtype: torch.dtype, clocks: Sequence[Clock], copies: Callable[[int], int]) -> list[Row]:
    """``clocks``: of the GPU alone, and of a call. ``copies``: how many of a case that moves so many bytes."""
    with torch.no_grad():
        candidates = case.build()
        check_agreement(candidates, dtype)
        count = copies(min(c.work.bytes for c in candidates))
        runs = [
            [c.run for c in same] for same in zip(candidates, *(case.build() for _ in range(count - 1)), strict=True)
        ]
        timed = zip(candidates, runs, strict=True)
        return [Row(case.kernel, case.shape, c.name, c.work, *(clock(r) for clock in clocks)) for c, r in timed]


def run(
    cases: Iterable[Case], device: torch.device, dtype: torch.dtype, seconds: float = math.inf
) -> tuple[list[Row], list[str]]:
    """The rows, and what went wrong in cases that have none. After so many ``seconds`` no other case begins."""
    on_gpu, begin = device.type == "cuda", time.perf_counter()
    clocks = (device_microseconds, call_microseconds) if on_gpu else (cpu_microseconds, cpu_microseconds)
    copies = copies_beyond_cache if on_gpu else (lambda _: 2)
    rows: list[Row] = []
    failures: list[str] = []
    for case in cases:
        if time.perf_counter() - begin > seconds:
            failures.append(f"{case.kernel}, {case.shape}: left out, as the time was over")
            continue
        try:
            rows += run_case(case, dtype, clocks, copies)
        except Exception:
            failures.append(f"{case.kernel}, {case.shape}:\n{traceback.format_exc()}")
        if on_gpu:
            # What a case leaves behind is not the next one's: memory, and code that was compiled for other sizes, which
            # counts towards the limit beyond which torch compiles no more.
            torch.cuda.empty_cache()
            torch.compiler.reset()
    return rows, failures
