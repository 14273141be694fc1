"""Compute a paged step in which each request's tokens use its own adapters.

A step without adapters, or with one adapter for all, runs the program itself. Every other step runs the code of a bank
on a stack of adapters. The stack is kept from step to step, and has at most the adapters of the bank and of requests.
In a package each adapter has an index in the compiled code, and all steps run that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from adaptc.bank.placement import Placement
from adaptc.bank.row_adapters import RowSelection
from adaptc.bank.stack_adapters import AdapterStack
from adaptc.bank.stack_engine import StackedRows
from adaptc.bank.stack_placement import StackPlacement
from adaptc.binding.binding import Binding
from adaptc.packages.package_engine import IndexedRows, PackageEngine
from adaptc.packages.package_placement import PackagePlacement
from adaptc.serving.request_adapter import RequestAdapter, binding_key
from adaptc.state.graph_engine import GraphEngine
from adaptc.state.runner import FORWARD, AdapterSelection, Runner

#: the adapters of one text of a step, and the number of its tokens
TextAdapter = tuple[RequestAdapter, int]


class StepAdapters(Protocol):
    """The code of one step program for requests with adapters of their own."""

    def request_adapter(self, name: str, mix: Mapping[str, float], bindings: Mapping[str, Binding]) -> RequestAdapter:
        """Return what a request called ``name`` keeps, with the weights ``mix`` of ``bindings``, by name."""
        ...

    def run(self, texts: Sequence[TextAdapter], inputs: Mapping[str, Tensor]) -> Any:
        """Return the logits of a step whose tokens are those of ``texts``, one after another."""
        ...


def step_adapters_of(placement: Placement, is_in_use: Callable[[Binding], bool]) -> StepAdapters:
    """Return the code of the step program that a bank has; ``is_in_use``: as for :class:`StackSteps`."""
    if isinstance(placement, StackPlacement):
        return StackSteps(placement, is_in_use)
    assert isinstance(placement, PackagePlacement)
    return PackageSteps(placement)


class PackageSteps:
    """The steps of a package."""

    def __init__(self, placement: PackagePlacement) -> None:
        self._placement, self._engine = placement, PackageEngine(placement.program)

    def request_adapter(self, name: str, mix: Mapping[str, float], bindings: Mapping[str, Binding]) -> RequestAdapter:
        kept: Any = self._placement.select(RowSelection.of_mixes((mix,), bindings)).selection
        return RequestAdapter(name, mix, bindings, kept)

    def run(self, texts: Sequence[TextAdapter], inputs: Mapping[str, Tensor]) -> Any:
        adapters = {key: b for adapter, _ in texts for key, b in adapter.adapters.items()}
        indices = {key: index for adapter, _ in texts for key, index in adapter.indices.items()}
        mixes, lengths = tuple(adapter.mix for adapter, _ in texts), tuple(count for _, count in texts)
        capacity = self._placement.limits.capacity
        assert capacity is not None
        rows = IndexedRows(Binding.empty(), mixes, adapters, True, lengths, indices, capacity)
        return self._engine.run(rows, (), dict(inputs))


class StackSteps:
    """The steps of a program in memory.

    ``is_in_use`` says whether a request that is not in a step keeps a binding.
    """

    def __init__(self, placement: StackPlacement, is_in_use: Callable[[Binding], bool]) -> None:
        self._placement, self._is_in_use = placement, is_in_use
        self._stack: AdapterStack | None = None
        self._runners: WeakKeyDictionary[Binding, Runner] = WeakKeyDictionary()

    def request_adapter(self, name: str, mix: Mapping[str, float], bindings: Mapping[str, Binding]) -> RequestAdapter:
        return RequestAdapter(name, mix, bindings)

    def run(self, texts: Sequence[TextAdapter], inputs: Mapping[str, Tensor]) -> Any:
        adapters = {key: b for adapter, _ in texts for key, b in adapter.adapters.items()}
        mixes, lengths = tuple(adapter.mix for adapter, _ in texts), tuple(count for _, count in texts)
        selection = RowSelection.of_mixes(mixes, adapters, lengths=lengths)
        self._drop_stale(adapters)
        single = selection.single_adapter
        if not selection.has_adapter or (single is not None and not self._placement.code_cache.uses_compiler):
            return self._direct_runner(None if single is None else adapters[single])(**inputs)
        rows = StackedRows(self._placement, selection, self._find_stack(selection.names, adapters))
        return rows.run(FORWARD, (), dict(inputs))

    def _direct_runner(self, binding: Binding | None) -> Any:
        program: Any = self._placement.program
        if binding is None:
            return program.base
        found = self._runners.get(binding)
        if found is None:
            engine = GraphEngine(program, self._placement.state)
            found = self._runners[binding] = Runner(engine, AdapterSelection(binding))
        return found

    def _find_stack(self, names: Sequence[str], adapters: Mapping[str, Binding]) -> AdapterStack:
        known = self._stack
        if known is not None and {*names} <= {*known.names}:
            return known
        members = {} if known is None else dict(known.named_bindings)
        members |= {name: adapters[name] for name in names}
        self._stack = self._placement.stack_of(members)
        return self._stack

    def _drop_stale(self, adapters: Mapping[str, Binding]) -> None:
        """Forget the stack where it has an adapter that neither the bank nor a request has any more."""
        known = self._stack
        if known is None:
            return
        present = {binding_key(b) for b in self._placement.table.contents.adapters.values()} | adapters.keys()
        if any(name not in present and not self._is_in_use(b) for name, b in known.named_bindings):
            self._stack = None
