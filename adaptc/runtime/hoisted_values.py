"""Compute hoisted values once for a binding, and again when a tensor they were made from has changed.

A lifted graph split by ``Hoist`` and all lifted inputs of one binding give a :class:`Prefix`. It returns the arguments
of the main graph for every call. Values that depend on the base alone are shared by all bindings.

Every tensor counts the writes to it (``_version``; torch has no other sign of one). So the next call sees a write that
went through torch. It does not see writes past that count: through ``tensor.data``, NumPy or a custom kernel. New
memory of a tensor (``tensor.data = ...``) is seen only when ``settled`` is asked. Optimizers write to slots in ways of
their own. So values of slots that require grad are never kept: for them the prologue runs in every call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.locks import free_in_children
from adaptc.passes.graph.pass_infra import Trail
from adaptc.passes.graph.storage import memory_of
from adaptc.passes.optimize.hoist import Hoist, Hoisting, Prologue
from adaptc.tables import size
from adaptc.torch_modes import plainly

aten = torch.ops.aten

_version, _place = attrgetter("_version"), methodcaller("data_ptr")


@dataclass(frozen=True)
class Held:
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

    def __add__(self, other: Held) -> Held:
        return Held(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """Return one line; '' where nothing is hoisted."""
        of = [(self.count, self.nbytes, "for this adapter"), (self.shared, self.shared_nbytes, "for all adapters")]
        shown = [f"{count} values {whom} ({size(nbytes)})" for count, nbytes, whom in of if count]
        if self.wide_nbytes:
            shown.append(f"{size(self.wide_nbytes)} of it in float32, of half precision")
        return f"computed once: {', '.join(shown)}" if shown else ""


@dataclass(frozen=True, eq=False)
class _Made:
    """The hoisted values of one stage, and what tells that they are stale.

    They are stale when a tensor in ``watched`` no longer has its version in ``versions``. They are stale, too, when one
    in ``sources`` no longer has its memory address in ``places``.
    """

    values: tuple[Any, ...] = ()
    watched: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    nbytes: int = 0
    wide_nbytes: int = 0
    sources: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()

    def fresh(self) -> bool:
        return tuple(map(_version, self.watched)) == self.versions

    def settled(self) -> bool:
        return tuple(map(_place, self.sources)) == self.places


class HoistedStage:
    """A prologue as code.

    ``inputs`` and ``sources`` are positions in one list: the lifted inputs, then the values of all stages in order.
    ``contiguous`` makes the results contiguous, for compiled code.
    """

    def __init__(self, prologue: Prologue, index: dict[str, int], contiguous: bool) -> None:
        if contiguous:
            _contiguous(prologue.graph)
        self.module = fx.GraphModule({}, prologue.graph)
        self.inputs = [index[n] for n in prologue.inputs]
        self.sources = [[index[n] for n in names] for names in prologue.sources]
        self.count = len(prologue.outputs)

    def run(self, values: Sequence[Any]) -> tuple[Any, ...]:
        with plainly(), torch.no_grad():  # what is kept must not depend on the call that happens to make it
            # Not the module itself: while any thread traces, torch.fx has patched ``nn.Module.__call__`` for all.
            return self.module.forward(*(values[i] for i in self.inputs))

    def make(self, lifted: Sequence[Any], before: Sequence[Any], originals: Sequence[Any]) -> _Made:
        """Run the prologue, and note which tensors make its values stale.

        ``before`` are the values of earlier stages. ``originals`` are the tensors that ``lifted`` was laid out from:
        writes go to these.
        """
        read = sorted({i for s in self.sources for i in s})
        # Versions are read before the values are made, so that a write in between makes the values stale.
        versions = {i: originals[i]._version for i in read if not originals[i].is_inference()}
        out = self.run([*lifted, *before])
        inputs = {memory_of(lifted[i]) for i in read}
        own = [n for n, t in enumerate(out) if memory_of(t) not in inputs]
        watch = sorted({i for n in own for i in self.sources[n]} & versions.keys())
        memory = {memory_of(out[n]): out[n].untyped_storage().nbytes() for n in own}
        wide = {memory_of(out[n]) for n in own if _widened(out[n], [lifted[i] for i in self.sources[n]])}
        watched = tuple(originals[i] for i in watch)
        sources = tuple(originals[i] for i in read)
        count = tuple(versions[i] for i in watch)
        nbytes = sum(memory.values()), sum(memory[m] for m in wide)
        return _Made(out, watched, count, *nbytes, sources, tuple(map(_place, sources)))


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
        self.module, self.main, self.stages, self.kept = module, module, [], list(range(len(names)))
        #: the record of the hoist pass; () where ``limit`` is 0
        self.trail: Trail = ()
        #: bytes of the hoisted values, for slots of the sizes that the graph has
        self.nbytes = 0
        if limit == 0:
            return
        users = {n.name for n in module.graph.find_nodes(op="placeholder")}.difference(names)
        done = Hoist([base, slots], users, limit, views=not compiled, constants=not compiled)(module.graph)
        self.trail = done.trail
        if done.count:
            self.nbytes = done.data.nbytes
            self._take(module, names, done.data, compiled)

    def _take(self, module: fx.GraphModule, names: Sequence[str], split: Hoisting, contiguous: bool) -> None:
        index = {n: i for i, n in enumerate([*names, *(n for p in split.stages for n in p.outputs)])}
        self.main = fx.GraphModule(module, split.main)
        self.stages = [HoistedStage(p, index, contiguous) for p in split.stages]
        self.kept = [index[n] for n in split.kept]

    @property
    def base_inputs(self) -> set[int]:
        """Return the positions of the lifted inputs that values shared by all bindings are made from."""
        return self._sources(0)

    @property
    def slot_inputs(self) -> set[int]:
        """Return the positions of the lifted inputs, base weights included, that one binding's values are made from."""
        return self._sources(1)

    def _sources(self, stage: int) -> set[int]:
        return {i for names in self.stages[stage].sources for i in names} if self.stages else set()

    def inputs(self, lifted: Sequence[Any]) -> list[Any]:
        """Return the main graph's lifted and hoisted inputs, computed now and not kept; fake inputs give fake ones."""
        values = list(lifted)
        for stage in self.stages:
            values += stage.module(*(values[i] for i in stage.inputs))
        return [*(lifted[i] for i in self.kept), *values[len(lifted) :]]


class Shared:
    """The values hoisted from the base alone, for all bindings that do not change the base."""

    def __init__(self, stage: HoistedStage) -> None:
        self.stage = stage
        self._lock = free_in_children(threading.Lock())
        self._made: _Made | None = None

    def made(self, lifted: Sequence[Any]) -> _Made:
        with self._lock:
            if self._made is None or not (self._made.fresh() and self._made.settled()):
                self._made = self.stage.make(lifted, (), lifted)
            return self._made


@dataclass(frozen=True, eq=False)
class _State:
    """The values that a prefix has made, replaced as a whole.

    ``inputs`` of the main graph were made of the ``lifted`` inputs. Where ``moving``, they lack the values hoisted from
    slots, which each call computes.
    """

    lifted: tuple[Any, ...]
    inputs: tuple[Any, ...]
    base: _Made = _Made()
    slots: _Made = _Made()
    fresh: Callable[[], bool] = _Made().fresh
    moving: bool = False


class Prefix:
    """The inputs of the main graph for one binding, without the user's.

    ``originals`` are the binding's lifted tensors, which ``lay`` pads and lays out as the graph takes them. ``moving``
    says that slots may change at any time. ``shared`` is None where the binding has a base of its own. ``room`` returns
    how many bytes may be kept now, None for any; where values would exceed it, those of slots are computed in each
    call. ``lock`` is shared by all prefixes that this room is for.
    """

    def __init__(
        self,
        code: SplitGraph,
        originals: Sequence[Any],
        lay: Callable[[list[Any]], list[Any]],
        moving: bool,
        shared: Shared | None,
        room: Callable[[], int | None] = lambda: None,
        lock: threading.Lock | None = None,
    ) -> None:
        self.code, self.originals, self.lay, self.moving = code, tuple(originals), lay, moving
        self.shared, self.room = shared, room
        self._lock = free_in_children(threading.Lock()) if lock is None else lock
        self.lifted = tuple(lay(list(originals)))
        same = all(new is old for new, old in zip(self.lifted, self.originals, strict=True))
        self.state: _State | None = None if code.stages or not same else _State(self.lifted, self.lifted)

    def values(self) -> tuple[Any, ...]:
        """Return the lifted and hoisted inputs of the main graph; one thread computes stale values anew."""
        state = self.state
        if state is None or not state.fresh():
            with self._lock, plainly():
                state = self.state
                if state is None or not state.fresh():
                    state = self.state = self._make()
        if state.moving:
            return (*state.inputs, *self.code.stages[1].run([*state.lifted, *state.base.values]))
        return state.inputs

    def _make(self) -> _State:
        """Compute the state from the tensors as they are now; raises whatever an op of the prologue raises."""
        counting = [t for t in self.originals if isinstance(t, Tensor) and not t.is_inference()]
        versions = {id(t): t._version for t in counting}
        lifted = tuple(self.lay(list(self.originals)))
        laid = [o for o, t in zip(self.originals, lifted, strict=True) if o is not t and id(o) in versions]
        base = slots = _Made()
        moving = False
        if self.code.stages:
            first, second = self.code.stages
            base = (self.shared or Shared(first)).made(lifted)
            slots = _Made() if self.moving else second.make(lifted, base.values, self.originals)
            room = self.room()
            moving = self.moving or (room is not None and base.nbytes + slots.nbytes > room)
            if moving:
                slots = _Made()
        watched = (*base.watched, *slots.watched, *laid)
        versions = (*base.versions, *slots.versions, *(versions[id(o)] for o in laid))
        inputs = (*(lifted[i] for i in self.code.kept), *base.values, *slots.values)
        return _State(lifted, inputs, base, slots, _Made((), watched, versions).fresh, moving)

    def settled(self) -> bool:
        """Return whether every tensor that values were made from still has the same memory address."""
        state = self.state
        return state is None or (state.base.settled() and state.slots.settled())

    @property
    def held(self) -> Held:
        """Return the memory of the values held now; nothing before the first call."""
        state = self.state
        if state is None:
            return Held()
        base, slots = state.base, state.slots
        wide = base.wide_nbytes + slots.wide_nbytes
        if self.shared is None:
            return Held(len(base.values) + len(slots.values), base.nbytes + slots.nbytes, wide_nbytes=wide)
        return Held(len(slots.values), slots.nbytes, len(base.values), base.nbytes, wide)


def _widened(value: Tensor, sources: Sequence[Tensor]) -> bool:
    """Return whether a value is in float32 and all floating-point tensors it was made from are in half precision.

    Scalars do not count.
    """
    types = {t.dtype for t in sources if t.ndim and t.is_floating_point()}
    return value.dtype == torch.float32 and bool(types) and all(t.itemsize < 4 for t in types)


def _contiguous(graph: fx.Graph) -> None:
    """Make a graph's results contiguous, so that code compiled for them need not know how they were made."""
    output = graph.output_node()
    with graph.inserting_before(output):
        results = [graph.call_function(aten.contiguous.default, (n,)) for n in output.args[0]]  # type: ignore[union-attr]
    output.args = (tuple(results),)
