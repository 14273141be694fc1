"""Runs the kernels' cases: checks that candidates agree, times them, and goes on where one case fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tests.gpu.roofline import Row
from tests.gpu.suite import Candidate, Case, Compile, Output
from tests.gpu.timing import call_microseconds, cpu_microseconds, device_microseconds

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


def run_case(case: Case, dtype: torch.dtype, clocks: Sequence[Callable[[Callable[[], object]], float]]) -> list[Row]:
    """``clocks``: of the GPU alone, and of a call."""
    with torch.no_grad():
        candidates = case.build()
        check_agreement(candidates, dtype)
        return [Row(case.kernel, case.shape, c.name, c.work, *(clock(c.run) for clock in clocks)) for c in candidates]


def run(cases: Iterable[Case], device: torch.device, dtype: torch.dtype) -> tuple[list[Row], list[str]]:
    """The rows, and what went wrong in cases that have none."""
    on_gpu = device.type == "cuda"
    clocks = (device_microseconds, call_microseconds) if on_gpu else (cpu_microseconds, cpu_microseconds)
    rows: list[Row] = []
    failures: list[str] = []
    for case in cases:
        try:
            rows += run_case(case, dtype, clocks)
        except Exception:
            failures.append(f"{case.kernel}, {case.shape}:\n{traceback.format_exc()}")
        if on_gpu:
            # What a case leaves behind is not the next one's: memory, and code that was compiled for other sizes, which
            # counts towards the limit beyond which torch compiles no more.
            torch.cuda.empty_cache()
            torch.compiler.reset()
    return rows, failures
