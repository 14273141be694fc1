"""Hold the inputs that one binding gives to the variants of a program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import ref

from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.locks import reset_after_fork
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM_FORM
from adaptc.runtime.added_lengths import VirtualTokenLengths
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.hoisted_values import HoistedInputs, HoistedMemory
from adaptc.runtime.options import RunOptions
from adaptc.runtime.variants.graph_variants import GraphVariants
from adaptc.runtime.weight_buffers import SiblingBuffers
from adaptc.torch_modes import outside_modes


class ArgumentsOwner(Protocol):
    """The part of an executor that :class:`Arguments` needs."""

    @property
    def base(self) -> Mapping[str, Tensor]: ...
    @property
    def inputs(self) -> Inputs: ...
    @property
    def virtual_tokens(self) -> VirtualTokenLengths: ...
    @property
    def lifted_names(self) -> Sequence[str | None]: ...
    @property
    def attachments(self) -> Sequence[Attachment]: ...
    @property
    def options(self) -> RunOptions: ...
    @property
    def variants(self) -> GraphVariants: ...
    @property
    def sibling_buffers(self) -> SiblingBuffers: ...
    def detach_values(self, values: Sequence[Any]) -> list[Any]: ...
    def make_hoisted_inputs(
        self,
        values: Sequence[Any],
        own_names: Collection[str],
        variant_name: str,
        buffers: Sequence[Tensor | None],
        byte_budget: Callable[[], int | None],
        lock: threading.Lock,
    ) -> HoistedInputs: ...


class Arguments:
    """The inputs that one binding gives to each variant of a program, made when that variant is first called with it.

    ``state`` replaces the tensors that calls write to, by FQN.
    """

    def __init__(self, executor: ArgumentsOwner, binding: Binding, state: Mapping[str, Tensor] | None = None) -> None:
        # Weak: the executor refers to this object too, and a cycle would keep a base until the next garbage collection.
        self._executor = ref(executor)
        own = {**binding.changed_base, **(state or {})}
        self._own_names = frozenset(own)
        known: Mapping[Any, Any] = {**executor.base, **own, **binding.values}
        self._values = [known[n] for n in executor.lifted_names]
        self.hoisted_inputs: dict[str, HoistedInputs] = {}
        self._buffers: dict[str, Sequence[Tensor | None]] = {}
        self._lock, self._hoist_lock = reset_after_fork(threading.Lock()), reset_after_fork(threading.Lock())
        self._chosen_variants: dict[str, str] = {}
        #: free size -> how many virtual tokens this binding puts in front of a call's tokens
        self.added_tokens = executor.virtual_tokens.token_counts(binding.values)
        self.checks = executor.virtual_tokens.checks(binding.values, [n for n, _ in executor.inputs.expected])
        #: ids of the sites that the adapter does not have
        self.sites_left_out = frozenset(
            a.id for a in executor.attachments if a.form != PROGRAM_FORM and a.id not in binding.methods
        )
        #: whether a slot requires grad, so that an optimizer may write to it at any time
        self.slots_may_change = any(v.requires_grad for v in binding.values.values())

    @property
    def executor(self) -> ArgumentsOwner | None:
        """Return the executor it was made for, None where that is gone; whoever calls with it keeps the executor."""
        return self._executor()

    def inputs_for(self, variant_name: str) -> HoistedInputs:
        """Return the hoisted inputs of one variant."""
        found = self.hoisted_inputs.get(variant_name)
        if found is None:
            owner = self._require_executor()
            buffers = owner.sibling_buffers.move(
                variant_name, self._own_names
            )  # before the lock is taken: it may wait for another one
            with self._lock, outside_modes():
                found = self.hoisted_inputs.get(variant_name)
                if found is None:
                    self._buffers[variant_name] = buffers
                    room = partial(
                        _byte_budget, ref(self), variant_name
                    )  # weak: a cycle would delay freeing this object
                    found = owner.make_hoisted_inputs(
                        self._values, self._own_names, variant_name, buffers, room, self._hoist_lock
                    )
                    self.hoisted_inputs[variant_name] = found
        return found

    def variant_in_limit(self, variant_name: str) -> str:
        """Return the variant that calls run which would run ``variant_name``.

        It is the first one they ran where ``hoist_limit`` leaves no room for the hoisted values of another.
        """
        found = self._chosen_variants.get(variant_name)
        if found is None:
            owner = self._require_executor()
            limit, needed = owner.options.hoist_limit, owner.variants.get(variant_name).split.nbytes
            with self._lock:
                kept = list(dict.fromkeys(self._chosen_variants.values()))
                used = sum(owner.variants.get(k).split.nbytes for k in kept)
                full = limit is not None and kept and variant_name not in kept and used + needed > limit
                found = self._chosen_variants.setdefault(variant_name, kept[0] if full else variant_name)
        return found

    def has_current_memory(self) -> bool:
        """Return whether every tensor that the hoisted inputs were made from still has the same memory address."""
        owner, made = self._require_executor(), list(self.hoisted_inputs.items())
        return all(
            p.has_current_memory() and owner.sibling_buffers.are_current(kind, self._buffers[kind]) for kind, p in made
        )

    def tensor(self, name: str) -> Tensor:
        """Return the tensor that calls pass for the lifted input with the FQN ``name``."""
        return self._values[self._require_executor().lifted_names.index(name)]

    @property
    def lifted(self) -> list[Any]:
        """Return the lifted inputs of the graph as it was captured, before hoisting."""
        return self._require_executor().detach_values(self._values)

    def _require_executor(self) -> ArgumentsOwner:
        executor = self._executor()
        assert executor is not None
        return executor

    @property
    def hoisted_memory(self) -> HoistedMemory:
        """Return the memory of the binding's hoisted values, over all variants it was called with."""
        # A list, since calls of other threads may add some meanwhile.
        return sum((p.memory for p in list(self.hoisted_inputs.values())), HoistedMemory())


def _byte_budget(arguments: ref[Arguments], variant_name: str) -> int | None:
    """Return how many bytes one variant may hoist, beside those of the binding's other variants; None: any."""
    mine = arguments()
    owner = None if mine is None else mine.executor
    limit = None if owner is None else owner.options.hoist_limit
    if mine is None or limit is None:
        return None
    held = [p.memory for k, p in list(mine.hoisted_inputs.items()) if k != variant_name]
    return limit - sum(h.nbytes + h.shared_nbytes for h in held)
