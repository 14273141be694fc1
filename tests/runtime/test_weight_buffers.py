"""Weights that move into one buffer while other threads read them: the old memory stays until they have read it."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
from torch import Tensor, nn

from adaptc.runtime.weight_buffers import begin_reading, end_reading, find_buffer, move_into_buffer


def weights() -> list[Tensor]:
    return [nn.Parameter(torch.randn(n, 5), requires_grad=False) for n in (3, 7)]


class Reader:
    """A thread in the middle of a call."""

    def __init__(self) -> None:
        self.begun, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self.begun.wait(20)

    def _read(self) -> None:
        outer, inner = begin_reading(), begin_reading()
        end_reading(inner)
        self.begun.set()
        assert self.leave.wait(20)
        end_reading(outer)

    def end(self) -> None:
        self.leave.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def alive(t: Tensor, start: int) -> bool:
    """Whether memory that began there is still somebody's."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o is not t]
    return any(o.device.type == "cpu" and o.layout is torch.strided and o.data_ptr() == start for o in tensors)


def test_values_and_objects_stay() -> None:
    tensors = weights()
    before = [t.clone() for t in tensors]
    buffer = move_into_buffer(tensors)
    assert buffer.shape == (10, 5)
    assert find_buffer(tensors) is buffer
    assert move_into_buffer(tensors) is buffer
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert tensors[1].data_ptr() == buffer.data_ptr() + 3 * 5 * 4


@pytest.mark.long
@pytest.mark.parametrize("readers", [0, 1, 2])
def test_old_memory_goes_when_the_last_reader_has_left(readers: int) -> None:
    tensors = weights()
    start = tensors[1].data_ptr()
    reading = [Reader() for _ in range(readers)]
    move_into_buffer(tensors)
    for reader in reading:
        assert alive(tensors[1], start), "a running call reads memory that is gone"
        reader.end()
    assert not alive(tensors[1], start), "it is kept for good"


@pytest.mark.long
def test_who_comes_later_keeps_nothing() -> None:
    tensors = weights()
    start = tensors[0].data_ptr()
    first = Reader()
    move_into_buffer(tensors)
    second = Reader()
    first.end()
    assert not alive(tensors[0], start)
    second.end()


@pytest.mark.long
def test_the_thread_that_moves_them_does_not_keep_them_itself() -> None:
    tensors = weights()
    start = tensors[0].data_ptr()
    mark = begin_reading()
    move_into_buffer(tensors)
    assert not alive(tensors[0], start)
    end_reading(mark)


@pytest.mark.long
def test_a_call_that_is_interrupted_before_it_can_end_keeps_nothing() -> None:
    tensors = weights()
    start = tensors[0].data_ptr()

    def interrupted() -> None:
        begin_reading()
        raise KeyboardInterrupt

    def call() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            interrupted()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    move_into_buffer(tensors)
    assert not alive(tensors[0], start)
