"""Record kernels as a CUDA graph, which is replayed on the memory that it was recorded with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.locks import reset_after_fork


class Recording(Protocol):
    """A call that was recorded. Its outputs hold the values of the last replay."""

    @property
    def outputs(self) -> Sequence[Any]: ...
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Record calls on one device. Recordings share memory, so only one of them may run at a time."""

    @property
    def device(self) -> torch.device: ...
    def record(self, run: Callable[[], Sequence[Any]]) -> Recording: ...
    def in_order(self) -> AbstractContextManager[None]:
        """Let what the block enqueues run after all that earlier blocks enqueued, whatever their streams."""
        ...


class CudaRecording:
    """A CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Any]) -> None:
        self.outputs, self.replay = outputs, graph.replay


_capture_lock = reset_after_fork(threading.Lock())


class CudaRecorder:
    """Record CUDA graphs on ``device``, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        #: a stream, and an event that it recorded behind the last replay; torch gives events two types
        self._last: tuple[int, Any] | None = None

    def record(self, run: Callable[[], Sequence[Any]]) -> Recording:
        # torch records on one stream for all threads.
        with _capture_lock, torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # By default a thread that allocates memory meanwhile would make the recording fail.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
            return CudaRecording(graph, outputs)

    @contextmanager
    def in_order(self) -> Any:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last[0] != stream.cuda_stream:
            stream.wait_event(self._last[1])
        try:
            yield
        finally:
            self._last = stream.cuda_stream, stream.record_event()


def recorder_for(tensors: Iterable[Any]) -> Recorder | None:
    """Return what records calls of a program with these tensors; None where they are not all on one CUDA device.

    Scalars may be elsewhere: kernels take them as numbers.
    """
    devices = {t.device for t in tensors if isinstance(t, Tensor) and t.ndim}
    return CudaRecorder(*devices) if len(devices) == 1 and next(iter(devices)).type == "cuda" else None
