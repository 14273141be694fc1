"""Make the code of a bank before calls need it.

The bank may be empty. Afterwards no call of up to the given number of adapters makes code, whatever its rows want and
however many there are. Calls that need no new code go on meanwhile.

Adapters may leave sites out. Graphs without these are made for each adapter of the bank, and for all together, up to
the limit on such graphs. Other sets of sites run the graph with all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from adaptc.bank.bank_code import BankCode
from adaptc.bank.capacity import Limits
from adaptc.bank.placement import BankTable
from adaptc.bank.stack_adapters import AdapterStack
from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError, short_repr
from adaptc.progress import stage
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.variants.graph_variants import PLAIN
from adaptc.state.core import ProgramCore


class WarmableBank(Protocol):
    """A bank, as far as :func:`warm_bank` uses it."""

    limits: Limits
    state: Mapping[str, Tensor]
    code_cache: BankCode

    table: BankTable

    @property
    def program(self) -> ProgramCore: ...

    def empty_stack(self, count: int) -> AdapterStack: ...

    def executors_of(self, program: ProgramCore) -> Iterable[Executor]: ...


def max_call_adapters(adapters: int | None, capacity: int | None, adapter_count: int) -> int:
    """Return the number of adapters that a call may name: ``adapters``, or by default the capacity, or else the number
    held, at least 2.

    Raises ConfigError for ``adapters`` that is not a number from 1 to the capacity.
    """
    if adapters is None:
        return capacity or max(adapter_count, 2)
    given: Any = adapters  # callers may give anything
    number = isinstance(given, int) and not isinstance(given, bool)
    if not number or adapters < 1 or (capacity is not None and adapters > capacity):
        until = "" if capacity is None else f" to {capacity}, which the bank may hold"
        raise ConfigError(f"adapters={short_repr(adapters)} is no number of adapters from 1{until}")
    return adapters


def warm_bank(bank: WarmableBank, adapters: int | None) -> None:
    """Make the code for calls of up to ``adapters`` adapters, and compute the hoisted values. ``adapters`` is read as
    :func:`max_call_adapters` says, which raises."""
    held = bank.table.contents.adapters
    most = max_call_adapters(adapters, bank.limits.capacity, len(held))
    whole: Any = bank.program  # of a class above, which has a base
    site_sets = _site_sets(frozenset(a.id for a in whole.adaptation.attachments), held.values())
    # Values may move that want gradients, which calls read by another variant.
    moving = whole.adaptation.training or any(v.requires_grad for b in held.values() for v in b.values.values())

    def warm(code: Executor, binding: Binding) -> None:
        if not whole.adaptation.training:
            fixed = replace(binding, values={n: t.detach() for n, t in binding.values.items()})
            _warm_executor(code, fixed, bank.state, site_sets)
        if moving:
            _warm_executor(code, binding, bank.state, site_sets)

    with stage("warming the program of the bank"):
        for program, binding in ((whole.base, Binding.empty()), (whole, whole.binding)):
            for code in bank.executors_of(program):
                warm(code, binding)
    with stage(f"warming the bank for calls of up to {most} adapters") as warming:
        for count in warming.track(sorted({bank.code_cache.stack_capacity(n) for n in range(1, most + 1)})):
            stack = bank.empty_stack(count)
            for code in bank.code_cache.all_executors(stack):
                warm(code, stack.binding)


def _site_sets(all_sites: frozenset[str], held: Iterable[Binding]) -> list[frozenset[str]]:
    """Return all sites, and those of the adapters ``held``: of all together, then of each."""
    used = [frozenset(b.methods) for b in held]
    together = [frozenset[str]().union(*used), *used] if used else []
    return list(dict.fromkeys([all_sites, *together]))


def _warm_executor(
    executor: Executor, binding: Binding, state: Mapping[str, Tensor], site_sets: Iterable[frozenset[str]]
) -> None:
    """Make what a call of any size would make with adapters of these sets of sites: compiled code, and the hoisted
    values."""
    if executor.uses_inductor:
        executor.compile()
    state = {n: t for n, t in state.items() if n in executor.base}
    for sites in site_sets:
        methods = {a.id: a.method for a in executor.attachments if a.id in sites}
        arguments = executor.arguments_with_state(replace(binding, methods=methods), state)
        for kind in _variant_names(executor, arguments):
            arguments.inputs_for(kind).values()
        if executor.uses_inductor or arguments.slots_may_change:
            break
    executor.variants.stop_adding_graphs()


def _variant_names(executor: Executor, arguments: Arguments) -> Iterable[str]:
    if executor.uses_inductor:
        return [executor.fixed_variant]
    if arguments.slots_may_change:
        return [PLAIN]
    kinds = executor.variants.for_warm_up(arguments.sites_left_out)
    return kinds if executor.options.hoist_limit is None else {arguments.variant_in_limit(kind): None for kind in kinds}
