"""Compute a paged step in which each request's tokens use its own adapters.

A step without adapters, or with one adapter for all, runs the program itself. Every other step runs the code of a bank
on a stack of adapters. The stack is kept from step to step, and has at most the adapters of the bank and of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from adaptc.bank.row_adapters import RowSelection
from adaptc.bank.stack_adapters import AdapterStack
from adaptc.bank.stack_engine import StackedRows
from adaptc.bank.stack_placement import StackPlacement
from adaptc.binding.binding import Binding
from adaptc.serving.request_adapter import RequestAdapter, binding_key
from adaptc.state.graph_engine import GraphEngine
from adaptc.state.runner import FORWARD, AdapterSelection, Runner

#: the adapters of one text of a step, and the number of its tokens
TextAdapter = tuple[RequestAdapter, int]


class StepAdapters:
    """The code of one step program for requests with adapters of their own.

    ``is_in_use`` says whether a request that is not in a step keeps a binding.
    """

    def __init__(self, placement: StackPlacement, is_in_use: Callable[[Binding], bool]) -> None:
        self._placement, self._is_in_use = placement, is_in_use
        self._stack: AdapterStack | None = None
        self._runners: WeakKeyDictionary[Binding, Runner] = WeakKeyDictionary()

    def run(self, texts: Sequence[TextAdapter], inputs: Mapping[str, Tensor]) -> Any:
        """Return the logits of a step whose tokens are those of ``texts``, one after another."""
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
