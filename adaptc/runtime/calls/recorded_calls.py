"""Record calls as CUDA graphs, and replay them: the processor launches one graph instead of hundreds of kernels.

A graph reads the memory that it was recorded with. So a call copies its inputs to where the graph reads them, replays,
and returns copies of the outputs. There is a graph for each kind of call: shapes, dtypes, and values that are no
tensors. Ranks are padded beforehand to few different ones (:mod:`adaptc.runtime.rank_padding`). The first call of a
kind runs as ever, and warms up. The second is recorded.

An adapter's tensors are read where they lie until another adapter of the same shapes is called. Then the tensors that
differ get memory of the graph's own, and the call is recorded once more. From then on a swap copies the adapter into
this memory. Base weights are never copied, nor are tensors that a call writes to, such as a cache. Their addresses are
part of the kind.

Some calls run as ever. These are calls that gradients flow through, that have inputs on another device, or in which an
op waits for the device. The same holds inside torch's modes, and while the caller records a graph. The reasons are
counted.

torch's own ``make_graphed_callables`` records one shape with the tensors of that moment, and inductor's graphs copy all
inputs in each call: here these are the weights, too.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from adaptc.locks import reset_after_fork
from adaptc.passes.graph.storage import memory_address
from adaptc.runtime.calls.cuda_recorder import Recorder
from adaptc.torch_modes import has_transform_or_tangent, in_dispatch_mode

#: the most graphs that the code of one program keeps; above it the one is dropped that was used least lately
MAX_GRAPHS = 32

#: the alignment of addresses, in bytes, that kernels are compiled for; torch's own memory has it
ALIGNMENT = 16

Code = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class CudaGraphs:
    """The number of kinds of calls that are replayed, and for each reason how many calls were not."""

    count: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])

    def __add__(self, other: CudaGraphs) -> CudaGraphs:
        return CudaGraphs(self.count + other.count, Counter(self.reasons) + Counter(other.reasons))

    def __str__(self) -> str:
        lines = [f"CUDA graphs: {self.count} kinds of calls are replayed"] if self.count or self.reasons else []
        return "\n".join([*lines, *(f"no CUDA graph for {n} calls: {why}" for why, n in self.reasons.items())])


class BoundValues(Protocol):
    """The base weights and adapter tensors that the code of one program takes, without the inputs of a call."""

    def values(self) -> tuple[Any, ...]: ...


class _Graph:
    """A recorded call: where it reads its inputs, and what was last copied there.

    ``own`` are the positions of bound values that have memory of the graph's own. ``written`` are the positions of
    given inputs that the call writes to.
    """

    def __init__(
        self,
        recorder: Recorder,
        code: Code,
        bound: Sequence[Any],
        given: Sequence[Any],
        own: set[int],
        written: set[int],
    ) -> None:
        self.own = own
        self._copied_inputs = [i for i, t in enumerate(given) if isinstance(t, Tensor) and i not in written]
        self._bound: list[Any] = [_room_like(v) if i in own else v for i, v in enumerate(bound)]
        self._given: list[Any] = [_room_like(t) if i in self._copied_inputs else t for i, t in enumerate(given)]
        self._addresses = _addresses(bound)
        self._sources: dict[int, tuple[ref[Tensor], int]] = {}
        self._copy_inputs(bound, given)
        self._recording = recorder.record(lambda: list(code(*self._bound, *self._given)))
        inputs = {id(t): i for i, t in enumerate(self._given) if isinstance(t, Tensor)}
        fixed = [v for i, v in enumerate(self._bound) if i not in own] + [self._given[i] for i in written]
        memory = {memory_address(t) for t in fixed if isinstance(t, Tensor)}
        #: for each output the position of the given input that it is, if any, and whether its values are to be copied
        self._outputs = [
            (inputs.get(id(t)), isinstance(t, Tensor) and memory_address(t) not in memory)
            for t in self._recording.outputs
        ]
        # Memory of the caller's is found by its address in each call: it must not live longer for this graph.
        self._bound = [v if i in own else None for i, v in enumerate(self._bound)]
        self._given = [v if i in self._copied_inputs else None for i, v in enumerate(self._given)]

    def moved(self, addresses: Sequence[int]) -> set[int]:
        """Return the positions of bound values that lie elsewhere now, and have no memory of the graph's own."""
        if addresses == self._addresses:
            return set()
        pairs = zip(addresses, self._addresses, strict=True)
        return {i for i, (now, before) in enumerate(pairs) if now != before} - self.own

    def replay(self, bound: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        self._copy_inputs(bound, given)
        self._recording.replay()
        pairs = zip(self._outputs, self._recording.outputs, strict=True)
        return [given[i] if i is not None else t.clone() if copies else t for (i, copies), t in pairs]

    def _copy_inputs(self, bound: Sequence[Any], given: Sequence[Any]) -> None:
        for i in self._copied_inputs:
            _without_repeats(self._given[i]).copy_(_without_repeats(given[i]))
        for i in self.own:
            value, version = bound[i], -1 if bound[i].is_inference() else bound[i]._version
            source = self._sources.get(i)
            if source is None or source[0]() is not value or source[1] != version or version < 0:
                _without_repeats(self._bound[i]).copy_(_without_repeats(value))
                self._sources[i] = ref(value), version


class RecordedCalls:
    """The recorded calls of one program's code. Any thread may call it; one call at a time is enqueued.

    ``positions`` takes the name of a code. It returns the positions of the adapter's tensors among bound values, and
    those of given inputs that it writes to.
    """

    def __init__(self, recorder: Recorder, positions: Callable[[str], tuple[set[int], set[int]]]) -> None:
        self._recorder, self._positions = recorder, positions
        self._lock = reset_after_fork(threading.Lock())
        #: kind of call -> its graph, the reason why there is none, or None where it was called once
        self._kinds: OrderedDict[Hashable, _Graph | str | None] = OrderedDict()
        self._reasons: Counter[str] = Counter()
        self._known_positions: dict[str, tuple[set[int], set[int]]] = {}
        #: what is said of bound values in kinds -> a number that stands for it
        self._layouts: OrderedDict[Hashable, int] = OrderedDict()
        self._numbers = itertools.count()
        self._layout_of: WeakKeyDictionary[BoundValues, tuple[Any, tuple[int, ...], int | None]] = WeakKeyDictionary()

    def __call__(self, name: str, code: Code, bound_values: BoundValues, given: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs of ``code``, called with bound values and given inputs. ``name`` tells which code it
        is."""
        bound = bound_values.values()
        why: str | None = self._why_as_ever(given)
        with self._lock, torch.no_grad():
            if not why:
                addresses, layout = self._find_layout(name, bound_values, bound)
                if layout is None:
                    why = f"a weight or a tensor of the adapter is not on {self._recorder.device}"
                else:
                    written = self._known_positions[name][1]
                    kind = name, layout, tuple(self._describe(v, i in written) for i, v in enumerate(given))
                    with self._recorder.in_order():
                        graph = self._find_graph(kind, addresses, code, bound, given, written)
                        if isinstance(graph, _Graph):
                            return graph.replay(bound, given)
                    why = graph  # None for the first call
            if why:
                self._reasons[why] += 1
        return code(*bound, *given)

    def _why_as_ever(self, given: Sequence[Any]) -> str:
        """Return why a call with these inputs is not replayed; "" where it may be."""
        tensors = [v for v in given if isinstance(v, Tensor)]
        if in_dispatch_mode() or has_transform_or_tangent(*tensors):
            return "it is called in a mode of torch's, or in a transform of torch.func"
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "gradients flow to its inputs"
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "the caller records a graph"
        if any(t.device != self._recorder.device for t in tensors):
            return f"an input is not on {self._recorder.device}"
        return ""

    def _find_layout(
        self, name: str, bound_values: BoundValues, bound: tuple[Any, ...]
    ) -> tuple[tuple[int, ...], int | None]:
        """Return the addresses of bound values, and the number of their layout; None where one is on another device.

        A layout has the shapes and dtypes of all, and the addresses of those that are not the adapter's.
        """
        addresses = _addresses(bound)
        known = self._layout_of.get(bound_values)
        if known is not None and known[0] is bound and known[1] == addresses:
            return known[1:]
        if name not in self._known_positions:
            self._known_positions[name] = self._positions(name)
        slots, number = self._known_positions[name][0], None
        if all(v.device == self._recorder.device for v in bound if isinstance(v, Tensor) and v.ndim):
            described = name, tuple(self._describe(v, i not in slots) for i, v in enumerate(bound))
            number = self._layouts.get(described)
            if number is None:
                number = self._layouts[described] = next(self._numbers)
            self._layouts.move_to_end(described)
            while len(self._layouts) > 4 * MAX_GRAPHS:
                self._layouts.popitem(last=False)
        self._layout_of[bound_values] = bound, addresses, number
        return addresses, number

    def _find_graph(
        self,
        kind: Hashable,
        addresses: Sequence[int],
        code: Code,
        bound: Sequence[Any],
        given: Sequence[Any],
        written: set[int],
    ) -> _Graph | str | None:
        """Return the graph of a kind, recorded now where it is the second call, or why there is none.

        None for the first call.
        """
        was_called = kind in self._kinds
        graph = self._kinds.setdefault(kind, None)
        self._kinds.move_to_end(kind)
        while len(self._kinds) > MAX_GRAPHS:
            self._kinds.popitem(last=False)
        own = graph.moved(addresses) | graph.own if isinstance(graph, _Graph) else set[int]()
        if was_called and (graph is None or (isinstance(graph, _Graph) and own != graph.own)):
            try:
                graph = _Graph(self._recorder, code, bound, given, own, written)
            except Exception as error:  # an op that waits for the device, or too little memory: the call runs as ever
                graph = f"{type(error).__name__}: {error}".splitlines()[0]
            self._kinds[kind] = graph
        return graph

    def _describe(self, value: Any, by_address: bool) -> Hashable:
        if not isinstance(value, Tensor):
            return type(value), value
        if not value.ndim and value.device != self._recorder.device:
            return value.dtype, value.item()  # kernels take it as a number
        return value.shape, value.stride(), value.dtype, _address(value) if by_address else 0

    @property
    def graphs(self) -> CudaGraphs:
        """Return how many kinds of calls are replayed now, and why calls so far were not."""
        with self._lock:
            return CudaGraphs(sum(isinstance(k, _Graph) for k in self._kinds.values()), dict(self._reasons))


def _addresses(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_address(v) if isinstance(v, Tensor) else 0 for v in values)


def _address(value: Tensor) -> int:
    return getattr(value, "memory_tensor", value).data_ptr()


@torch.inference_mode(False)  # nothing could be copied later to memory that was made in that mode
def _room_like(value: Tensor) -> Tensor:
    """Return memory for values of the shape, strides and alignment of ``value``.

    Kernels are compiled for alignments, and while a graph is recorded none may be loaded.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    offset = value.data_ptr() % ALIGNMENT // value.itemsize
    room = torch.empty(offset + max(extent, 0), dtype=value.dtype, device=value.device)
    return room.as_strided(value.shape, value.stride(), offset)


def _without_repeats(value: Tensor) -> Tensor:
    """Return a view without the axes along which a tensor repeats its memory: nothing can be copied to those."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if size > 1 and stride == 0:
            value = value.narrow(axis, 0, 1)
    return value
