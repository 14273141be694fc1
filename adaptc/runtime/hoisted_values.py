"""Compute hoisted values once for a binding, and again when a tensor they were made from has changed.

A lifted graph split by ``Hoist`` and all lifted inputs of one binding give a :class:`HoistedInputs`. It returns the
arguments of the main graph for every call. Values that depend on the base alone are shared by all bindings.

Every tensor counts the writes to it (``_version``; torch has no other sign of one). So the next call sees a write that
went through torch. It does not see writes past that count: through ``tensor.data``, NumPy or a custom kernel. New
memory of a tensor (``tensor.data = ...``) is seen only when ``has_current_memory`` is asked. Optimizers write to slots
in ways of their own. So values of slots that require grad are never kept: for them the prologue runs in every call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass, field
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.locks import reset_after_fork
from adaptc.passes.graph.pass_infra import PassTrail
from adaptc.passes.graph.storage import memory_address
from adaptc.passes.optimize.hoist import Hoist, HoistedGraphs, Prologue
from adaptc.tables import format_bytes
from adaptc.torch_modes import outside_modes

aten = torch.ops.aten

_version_of, _address_of = attrgetter("_version"), methodcaller("data_ptr")


@dataclass(frozen=True)
class HoistedMemory:
    """The memory of hoisted values.

    ``count`` values hold ``nbytes`` for one binding. ``shared`` values hold ``shared_nbytes`` for all bindings
    together. Views of other tensors count as values and hold no bytes. ``wide_nbytes`` are those of these bytes that
    hold float32 copies of half-precision tensors.
    """

    count: int = 0
    nbytes: int = 0
    shared: int = 0
    shared_nbytes: int = 0
    wide_nbytes: int = 0

    def __add__(self, other: HoistedMemory) -> HoistedMemory:
        return HoistedMemory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """Return one line; '' where nothing is hoisted."""
        of = [(self.count, self.nbytes, "for this adapter"), (self.shared, self.shared_nbytes, "for all adapters")]
        shown = [f"{count} values {whom} ({format_bytes(nbytes)})" for count, nbytes, whom in of if count]
        if self.wide_nbytes:
            shown.append(f"{format_bytes(self.wide_nbytes)} of it in float32, of half precision")
        return f"computed once: {', '.join(shown)}" if shown else ""


@dataclass(frozen=True, eq=False)
class _StageValues:
    """The hoisted values of one stage, and what tells that they are stale.

    They are stale when a tensor in ``watched`` no longer has its version in ``versions``. They are stale, too, when one
    in ``sources`` no longer has its memory address in ``addresses``.
    """

    values: tuple[Any, ...] = ()
    watched: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    nbytes: int = 0
    wide_nbytes: int = 0
    sources: tuple[Tensor, ...] = ()
    addresses: tuple[int, ...] = ()

    def is_fresh(self) -> bool:
        return tuple(map(_version_of, self.watched)) == self.versions

    def has_current_memory(self) -> bool:
        return tuple(map(_address_of, self.sources)) == self.addresses


class HoistedStage:
    """A prologue as code.

    ``inputs`` and ``sources`` are positions in one list: the lifted inputs, then the values of all stages in order.
    ``contiguous`` makes the results contiguous, for compiled code.
    """

    def __init__(self, prologue: Prologue, index: dict[str, int], contiguous: bool) -> None:
        if contiguous:
            _make_contiguous(prologue.graph)
        self.module = fx.GraphModule({}, prologue.graph)
        self.inputs = [index[n] for n in prologue.inputs]
        self.sources = [[index[n] for n in names] for names in prologue.sources]
        self.count = len(prologue.outputs)

    def run_prologue(self, values: Sequence[Any]) -> tuple[Any, ...]:
        with outside_modes(), torch.no_grad():  # what is kept must not depend on the call that happens to make it
            # Not the module itself: while any thread traces, torch.fx has patched ``nn.Module.__call__`` for all.
            return self.module.forward(*(values[i] for i in self.inputs))

    def compute_values(
        self, lifted: Sequence[Any], earlier_values: Sequence[Any], originals: Sequence[Any]
    ) -> _StageValues:
        """Run the prologue, and note which tensors make its values stale.

        ``earlier_values`` are the values of earlier stages. ``originals`` are the tensors that ``lifted`` was laid out
        from: writes go to these.
        """
        read_positions = sorted({i for s in self.sources for i in s})
        # Versions are read before the values are made, so that a write in between makes the values stale.
        versions = {i: originals[i]._version for i in read_positions if not originals[i].is_inference()}
        outputs = self.run_prologue([*lifted, *earlier_values])
        inputs = {memory_address(lifted[i]) for i in read_positions}
        own = [n for n, t in enumerate(outputs) if memory_address(t) not in inputs]
        watch = sorted({i for n in own for i in self.sources[n]} & versions.keys())
        memory = {memory_address(outputs[n]): outputs[n].untyped_storage().nbytes() for n in own}
        wide = {
            memory_address(outputs[n]) for n in own if _is_widened(outputs[n], [lifted[i] for i in self.sources[n]])
        }
        watched = tuple(originals[i] for i in watch)
        sources = tuple(originals[i] for i in read_positions)
        count = tuple(versions[i] for i in watch)
        nbytes = sum(memory.values()), sum(memory[m] for m in wide)
        return _StageValues(outputs, watched, count, *nbytes, sources, tuple(map(_address_of, sources)))


class SplitGraph:
    """A program's graph, split into prologues that are hoisted and the main graph that calls run.

    ``names`` are the placeholders of lifted inputs, in order. Of these, ``base`` are frozen for all bindings and
    ``slots`` within each. ``limit`` bounds the bytes that one binding's hoisted values may hold: None for any, 0 to
    hoist nothing. ``compiled`` says that a compiler gets the main graph, so views and constants stay in it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        names: Sequence[str],
        base: Collection[str],
        slots: Collection[str],
        limit: int | None,
        compiled: bool,
    ) -> None:
        self.module, self.main, self.stages, self.kept_inputs = module, module, [], list(range(len(names)))
        #: the record of the hoist pass; () where ``limit`` is 0
        self.trail: PassTrail = ()
        #: bytes of the hoisted values, for slots of the sizes that the graph has
        self.nbytes = 0
        if limit == 0:
            return
        users = {n.name for n in module.graph.find_nodes(op="placeholder")}.difference(names)
        done = Hoist([base, slots], users, limit, hoists_views=not compiled, hoists_constants=not compiled)(
            module.graph
        )
        self.trail = done.trail
        if done.count:
            self.nbytes = done.data.nbytes
            self._set_stages(module, names, done.data, compiled)

    def _set_stages(self, module: fx.GraphModule, names: Sequence[str], split: HoistedGraphs, contiguous: bool) -> None:
        index = {n: i for i, n in enumerate([*names, *(n for p in split.stages for n in p.outputs)])}
        self.main = fx.GraphModule(module, split.main)
        self.stages = [HoistedStage(p, index, contiguous) for p in split.stages]
        self.kept_inputs = [index[n] for n in split.kept_placeholders]

    @property
    def base_inputs(self) -> set[int]:
        """Return the positions of the lifted inputs that values shared by all bindings are made from."""
        return self._source_positions(0)

    @property
    def slot_inputs(self) -> set[int]:
        """Return the positions of the lifted inputs, base weights included, that one binding's values are made from."""
        return self._source_positions(1)

    def _source_positions(self, stage: int) -> set[int]:
        return {i for names in self.stages[stage].sources for i in names} if self.stages else set()

    def slot_values(self, is_slot: Sequence[bool]) -> list[bool]:
        """Return, for each lifted and hoisted input of the main graph, whether it is a slot's or was made from one.

        ``is_slot`` says it for the lifted inputs of the whole graph.
        """
        kept = [is_slot[i] for i in self.kept_inputs]
        return kept + [number == 1 for number, stage in enumerate(self.stages) for _ in range(stage.count)]

    def compute_inputs(self, lifted: Sequence[Any]) -> list[Any]:
        """Return the main graph's lifted and hoisted inputs, computed now and not kept; fake inputs give fake ones."""
        values = list(lifted)
        for stage in self.stages:
            values += stage.module(*(values[i] for i in stage.inputs))
        return [*(lifted[i] for i in self.kept_inputs), *values[len(lifted) :]]


class StreamHandover:
    """CUDA tensors, and the stream that computed the last of them: calls on other streams wait for it, once each.

    They also tell the allocator of their stream. Otherwise a swap, which frees the tensors, would give their memory
    away under a call that another stream has not computed yet.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._tensors = [t for t in tensors if isinstance(t, Tensor) and t.is_cuda]
        self._known: set[int] = set()
        if self._tensors:
            self._device = self._tensors[0].device
            stream = torch.cuda.current_stream(self._device)
            self._computed = stream.record_event()
            self._known.add(stream.cuda_stream)

    def to_current_stream(self) -> None:
        """Let the current stream use the tensors."""
        if not self._tensors:
            return
        stream = torch.cuda.current_stream(self._device)
        # A capture begins when all streams are done, and cannot wait for what was recorded before it.
        if stream.cuda_stream in self._known or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._computed)
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._known.add(stream.cuda_stream)


class SharedValues:
    """The values hoisted from the base alone, for all bindings that do not change the base."""

    def __init__(self, stage: HoistedStage) -> None:
        self.stage = stage
        self._lock = reset_after_fork(threading.Lock())
        self._values: _StageValues | None = None
        self._handover = StreamHandover(())

    def values_for(self, lifted: Sequence[Any]) -> _StageValues:
        with self._lock:
            if self._values is None or not (self._values.is_fresh() and self._values.has_current_memory()):
                self._values = self.stage.compute_values(lifted, (), lifted)
                self._handover = StreamHandover(self._values.values)
            self._handover.to_current_stream()
            return self._values


@dataclass(frozen=True, eq=False)
class _HoistedState:
    """The values that hoisted inputs have made, replaced as a whole.

    ``inputs`` of the main graph were made of the ``lifted`` inputs. Where ``slots_may_change``, they lack the values
    hoisted from slots, which each call computes. ``handover`` gives them to the stream of a call.
    """

    lifted: tuple[Any, ...]
    inputs: tuple[Any, ...]
    base: _StageValues = _StageValues()
    slots: _StageValues = _StageValues()
    is_fresh: Callable[[], bool] = _StageValues().is_fresh
    slots_may_change: bool = False
    handover: StreamHandover = field(default_factory=lambda: StreamHandover(()))


class HoistedInputs:
    """The inputs of the main graph for one binding, without the user's.

    ``originals`` are the binding's lifted tensors, which ``lay_out`` pads and lays out as the graph takes them.
    ``slots_may_change`` says that slots may change at any time. ``shared`` is None where the binding has a base of its
    own. ``byte_budget`` returns how many bytes may be kept now, None for any; where values would exceed it, those of
    slots are computed in each call. ``lock`` is shared by all hoisted inputs that this budget is for.
    """

    def __init__(
        self,
        split: SplitGraph,
        originals: Sequence[Any],
        lay_out: Callable[[list[Any]], list[Any]],
        slots_may_change: bool,
        shared: SharedValues | None,
        byte_budget: Callable[[], int | None] = lambda: None,
        lock: threading.Lock | None = None,
    ) -> None:
        self.split, self.originals, self.lay_out, self.slots_may_change = (
            split,
            tuple(originals),
            lay_out,
            slots_may_change,
        )
        self.shared, self.byte_budget = shared, byte_budget
        self._lock = reset_after_fork(threading.Lock()) if lock is None else lock
        self.laid_out = tuple(lay_out(list(originals)))
        same = all(new is old for new, old in zip(self.laid_out, self.originals, strict=True))
        self.state: _HoistedState | None = (
            None
            if split.stages or not same
            else _HoistedState(self.laid_out, self.laid_out, handover=StreamHandover(self.laid_out))
        )

    def values(self) -> tuple[Any, ...]:
        """Return the lifted and hoisted inputs of the main graph; one thread computes stale values anew."""
        state = self.state
        if state is None or not state.is_fresh():
            with self._lock, outside_modes():
                state = self.state
                if state is None or not state.is_fresh():
                    state = self.state = self._compute_state()
        state.handover.to_current_stream()
        if state.slots_may_change:
            return (*state.inputs, *self.split.stages[1].run_prologue([*state.lifted, *state.base.values]))
        return state.inputs

    def _compute_state(self) -> _HoistedState:
        """Compute the state from the tensors as they are now; raises whatever an op of the prologue raises."""
        counting = [t for t in self.originals if isinstance(t, Tensor) and not t.is_inference()]
        versions = {id(t): t._version for t in counting}
        lifted = tuple(self.lay_out(list(self.originals)))
        copied = [o for o, t in zip(self.originals, lifted, strict=True) if o is not t and id(o) in versions]
        base = slots = _StageValues()
        slots_may_change = False
        if self.split.stages:
            first, second = self.split.stages
            base = (self.shared or SharedValues(first)).values_for(lifted)
            slots = (
                _StageValues() if self.slots_may_change else second.compute_values(lifted, base.values, self.originals)
            )
            room = self.byte_budget()
            slots_may_change = self.slots_may_change or (room is not None and base.nbytes + slots.nbytes > room)
            if slots_may_change:
                slots = _StageValues()
        watched = (*base.watched, *slots.watched, *copied)
        versions = (*base.versions, *slots.versions, *(versions[id(o)] for o in copied))
        inputs = (*(lifted[i] for i in self.split.kept_inputs), *base.values, *slots.values)
        is_fresh = _StageValues((), watched, versions).is_fresh
        return _HoistedState(lifted, inputs, base, slots, is_fresh, slots_may_change, StreamHandover(inputs))

    def has_current_memory(self) -> bool:
        """Return whether every tensor that values were made from still has the same memory address."""
        state = self.state
        return state is None or (state.base.has_current_memory() and state.slots.has_current_memory())

    @property
    def memory(self) -> HoistedMemory:
        """Return the memory of the values held now; nothing before the first call."""
        state = self.state
        if state is None:
            return HoistedMemory()
        base, slots = state.base, state.slots
        wide = base.wide_nbytes + slots.wide_nbytes
        if self.shared is None:
            return HoistedMemory(len(base.values) + len(slots.values), base.nbytes + slots.nbytes, wide_nbytes=wide)
        return HoistedMemory(len(slots.values), slots.nbytes, len(base.values), base.nbytes, wide)


def _is_widened(value: Tensor, sources: Sequence[Tensor]) -> bool:
    """Return whether a value is in float32 and all floating-point tensors it was made from are in half precision.

    Scalars do not count.
    """
    types = {t.dtype for t in sources if t.ndim and t.is_floating_point()}
    return value.dtype == torch.float32 and bool(types) and all(t.itemsize < 4 for t in types)


def _make_contiguous(graph: fx.Graph) -> None:
    """Make a graph's results contiguous, so that code compiled for them need not know how they were made."""
    output = graph.output_node()
    with graph.inserting_before(output):
        results = [graph.call_function(aten.contiguous.default, (n,)) for n in output.args[0]]  # type: ignore[union-attr]
    output.args = (tuple(results),)
