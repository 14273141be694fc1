"""Make the code of a bank before calls need it.

The bank may be empty. Afterwards no call of up to the given number of adapters makes code, whatever its rows want and
however many there are. Calls that need no new code go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from adaptc.bank.bank_code import BankCode
from adaptc.bank.capacity import Limits
from adaptc.bank.selection import Stack
from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError, shown
from adaptc.progress import stage
from adaptc.runtime.executor import Arguments, Executor
from adaptc.state.core import ProgramCore


class Warmable(Protocol):
    """A bank, as far as :func:`warm_bank` uses it."""

    limits: Limits
    state: Mapping[str, Tensor]
    codes: BankCode

    @property
    def program(self) -> ProgramCore: ...

    def __len__(self) -> int: ...

    def empty_stack(self, count: int) -> Stack: ...

    def codes_of(self, program: ProgramCore) -> Iterable[Executor]: ...


def most_of(adapters: int | None, capacity: int | None, held: int) -> int:
    """Return the number of adapters that a call may name: ``adapters``, or by default the capacity, or else the number
    held, at least 2.

    Raises ConfigError for ``adapters`` that is not a number from 1 to the capacity.
    """
    if adapters is None:
        return capacity or max(held, 2)
    number = isinstance(adapters, int) and not isinstance(adapters, bool)
    if not number or adapters < 1 or (capacity is not None and adapters > capacity):
        until = "" if capacity is None else f" to {capacity}, which the bank may hold"
        raise ConfigError(f"adapters={shown(adapters)} is no number of adapters from 1{until}")
    return adapters


def warm_bank(bank: Warmable, adapters: int | None) -> None:
    """Make the code for calls of up to ``adapters`` adapters, and compute the hoisted values. ``adapters`` is read as
    :func:`most_of` says, which raises."""
    most = most_of(adapters, bank.limits.capacity, len(bank))
    base: Any = bank.program.base  # type: ignore[attr-defined]
    with stage("warming the program of the bank"):
        for program, binding in ((base, Binding.none()), (bank.program, bank.program.binding)):
            for code in bank.codes_of(program):
                _warm(code, binding, bank.state)
    with stage(f"warming the bank for calls of up to {most} adapters") as warming:
        for count in warming.over(sorted({bank.codes.count(n) for n in range(1, most + 1)})):
            stack = bank.empty_stack(count)
            for code in bank.codes.every(stack):
                _warm(code, stack.binding, bank.state)


def _warm(code: Executor, binding: Binding, state: Mapping[str, Tensor]) -> None:
    """Make what a call of any size would make: compiled code, and the hoisted values."""
    if code.compiles:
        code.compile()
    arguments = code.own_arguments(binding, {n: t for n, t in state.items() if n in code.base})
    for kind in _kinds(code, arguments):
        arguments.get(kind).values()


def _kinds(code: Executor, arguments: Arguments) -> Iterable[str]:
    if code.compiles or arguments.moving:
        return [code.fixed_kind]
    kinds = code.variants.kinds
    return kinds if code.options.hoist_limit is None else {arguments.settle(kind): None for kind in kinds}
