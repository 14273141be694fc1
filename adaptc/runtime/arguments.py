"""Hold the inputs that one binding gives to the variants of a program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import ref

from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.locks import free_in_children
from adaptc.runtime.added_lengths import Lengths
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.hoisted_values import Held, Prefix
from adaptc.runtime.options import RunOptions
from adaptc.runtime.variants import GraphVariants
from adaptc.torch_modes import plainly


class Owner(Protocol):
    """The part of an executor that :class:`Arguments` needs."""

    @property
    def base(self) -> Mapping[str, Tensor]: ...
    @property
    def inputs(self) -> Inputs: ...
    @property
    def lengths(self) -> Lengths: ...
    @property
    def lifted_names(self) -> Sequence[str | None]: ...
    @property
    def options(self) -> RunOptions: ...
    @property
    def variants(self) -> GraphVariants: ...
    def buffers(self, kind: str, own: Collection[str]) -> Sequence[Tensor | None]: ...
    def detached(self, values: Sequence[Any]) -> list[Any]: ...
    def lie_in(self, kind: str, buffers: Sequence[Tensor | None]) -> bool: ...
    def prefix(
        self,
        values: Sequence[Any],
        own: Collection[str],
        kind: str,
        buffers: Sequence[Tensor | None],
        room: Callable[[], int | None],
        lock: threading.Lock,
    ) -> Prefix: ...


class Arguments:
    """The inputs that one binding gives to each variant of a program, made when that variant is first called with it.

    ``state`` replaces the tensors that calls write to, by FQN.
    """

    def __init__(self, executor: Owner, binding: Binding, state: Mapping[str, Tensor] | None = None) -> None:
        # Weak: the executor refers to this object too, and a cycle would keep a base until the next garbage collection.
        self._executor = ref(executor)
        own = {**binding.base, **(state or {})}
        self._own = frozenset(own)
        known: Mapping[Any, Any] = {**executor.base, **own, **binding.values}
        self._values = [known[n] for n in executor.lifted_names]
        self.prefixes: dict[str, Prefix] = {}
        self._buffers: dict[str, Sequence[Tensor | None]] = {}
        self._lock, self._making = free_in_children(threading.Lock()), free_in_children(threading.Lock())
        self._settled: dict[str, str] = {}
        #: free size -> how many virtual tokens this binding puts in front of a call's tokens
        self.longer = executor.lengths.in_binding(binding.values)
        self.checks = executor.lengths.checks(binding.values, [n for n, _ in executor.inputs.expected])
        #: whether a slot requires grad, so that an optimizer may write to it at any time
        self.moving = any(v.requires_grad for v in binding.values.values())

    @property
    def executor(self) -> Owner | None:
        """Return the executor it was made for, None where that is gone; whoever calls with it keeps the executor."""
        return self._executor()

    def get(self, kind: str) -> Prefix:
        """Return the prefix for one variant."""
        found = self.prefixes.get(kind)
        if found is None:
            owner = self._owner()
            buffers = owner.buffers(kind, self._own)  # before the lock is taken: it may wait for another one
            with self._lock, plainly():
                found = self.prefixes.get(kind)
                if found is None:
                    self._buffers[kind] = buffers
                    room = partial(_room, ref(self), kind)  # weak: a cycle would delay freeing this object
                    found = owner.prefix(self._values, self._own, kind, buffers, room, self._making)
                    self.prefixes[kind] = found
        return found

    def settle(self, kind: str) -> str:
        """Return the variant that calls run which would run ``kind``.

        It is the first one they ran where ``hoist_limit`` leaves no room for the hoisted values of another.
        """
        found = self._settled.get(kind)
        if found is None:
            owner = self._owner()
            limit, needed = owner.options.hoist_limit, owner.variants.get(kind).split.nbytes
            with self._lock:
                kept = list(dict.fromkeys(self._settled.values()))
                used = sum(owner.variants.get(k).split.nbytes for k in kept)
                full = limit is not None and kept and kind not in kept and used + needed > limit
                found = self._settled.setdefault(kind, kept[0] if full else kind)
        return found

    def settled(self) -> bool:
        """Return whether every tensor that the prefixes were made from still has the same memory address."""
        owner, made = self._owner(), list(self.prefixes.items())
        return all(p.settled() and owner.lie_in(kind, self._buffers[kind]) for kind, p in made)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor that calls pass for the lifted input with the FQN ``name``."""
        return self._values[self._owner().lifted_names.index(name)]

    @property
    def lifted(self) -> list[Any]:
        """Return the lifted inputs of the graph as it was captured, before hoisting."""
        return self._owner().detached(self._values)

    def _owner(self) -> Owner:
        executor = self._executor()
        assert executor is not None
        return executor

    @property
    def held(self) -> Held:
        """Return the memory of the binding's hoisted values, over all variants it was called with."""
        return sum((p.held for p in self.prefixes.values()), Held())


def _room(arguments: ref[Arguments], kind: str) -> int | None:
    """Return how many bytes one variant may hoist, beside those of the binding's other variants; None: any."""
    mine = arguments()
    owner = None if mine is None else mine.executor
    limit = None if owner is None else owner.options.hoist_limit
    if mine is None or limit is None:
        return None
    held = [p.held for k, p in list(mine.prefixes.items()) if k != kind]
    return limit - sum(h.nbytes + h.shared_nbytes for h in held)
