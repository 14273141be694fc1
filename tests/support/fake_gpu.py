"""A GPU that is not there, for Triton and for streams: launches go the whole way through Triton, and then nowhere.

Kernels are not compiled either. What is real is what Triton tells one kernel from another by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

_DEVICES = count(1000)


class FakeDriver:
    """What Triton asks a driver before a launch. Each has a device of its own, of which Triton knows no kernel yet."""

    def __init__(self) -> None:
        self.device = next(_DEVICES)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class FakeKernel:
    """What Triton would have compiled. ``launches`` are the grids."""

    def __init__(self, source: Any) -> None:
        self.name, self.launches = source.fn.__name__, list[Any]()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: self.launches.append(grid)

    def run(self, *grid: Any) -> None:
        self.launches.append(grid[:3])

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    function = packed_metadata = None


@contextmanager
def fake_gpu() -> Iterator[list[FakeKernel]]:
    """Let ops on CPU tensors launch on a GPU that is not there; yields the kernels that were compiled."""
    made: list[FakeKernel] = []

    def compile_nothing(source: Any, **_: Any) -> FakeKernel:
        made.append(FakeKernel(source))
        return made[-1]

    def runs_kernels(x: Tensor) -> bool:
        return True

    with (
        mock.patch.object(jit, "driver", SimpleNamespace(active=FakeDriver())),
        mock.patch.object(triton.compiler, "compile", compile_nothing),
        mock.patch("adaptc.kernels.packed_lora.runs_kernels", runs_kernels),
        mock.patch("adaptc.kernels.lora_linear.runs_kernels", runs_kernels),
        mock.patch("adaptc.kernels.lora_epilogue.runs_kernels", runs_kernels),
        mock.patch("adaptc.kernels.dora_linear.runs_kernels", runs_kernels),
        mock.patch("adaptc.kernels.grouped_lora.runs_kernels", runs_kernels),
        mock.patch.dict("adaptc.kernels.packed_lora._KERNELS", clear=True),
        mock.patch.dict("adaptc.kernels.packed_lora._PLANS", clear=True),
    ):
        yield made


class Stream:
    """A CUDA stream without CUDA, which writes down what it is asked for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited = number, list[Any]()

    def record_event(self) -> str:
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)
