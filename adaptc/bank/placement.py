"""Say what a bank has, and what it asks of the place where its adapters are: stacks, or indices of compiled code.

A :class:`BankContents` is never written to. A change makes another one, which is put in place by one assignment. So a
change that is interrupted leaves the bank either as it was, or changed as a whole. The :class:`BankTable` is where the
present contents are.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch.export import ExportedProgram

from adaptc.bank.bank_report import BankReport
from adaptc.bank.capacity import Limits
from adaptc.bank.row_adapters import RowSelection
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.locks import reset_after_fork
from adaptc.state.runner import Runner


class Placed(Protocol):
    """A placement's memory of the adapters: stacks of them, or their indices in compiled code."""

    def without_stale(self, adapters: Mapping[str, Binding]) -> Any:
        """Return what is left when the bank has these adapters alone."""
        ...


@dataclass(frozen=True, eq=False)
class BankContents:
    """The contents of a bank at one moment.

    ``adapters``: name -> binding, in the order in which they were added. ``use_order``: their names, most recently used
    last. ``placed``: what the placement remembers of them.
    """

    placed: Any
    adapters: Mapping[str, Binding] = field(default_factory=dict[str, Binding])
    use_order: tuple[str, ...] = ()

    def with_adapter(self, name: str, binding: Binding, evicted: Collection[str] = ()) -> Self:
        """Return contents that have ``binding`` under ``name``, new or as a replacement, and not the adapters that are
        ``evicted``."""
        left = self.without_adapters(evicted)
        order = (*(n for n in left.use_order if n != name), name)
        return left.with_adapters({**left.adapters, name: binding}, order)

    def without_adapters(self, names: Collection[str]) -> Self:
        """Return contents without the adapters called ``names``."""
        left = {n: b for n, b in self.adapters.items() if n not in names}
        return self.with_adapters(left, tuple(n for n in self.use_order if n not in names))

    def after_use_of(self, names: Collection[str]) -> Self:
        """Return contents after a call that used the adapters ``names``, which are now the most recently used."""
        last = tuple(n for n in names if n in self.adapters)
        if self.use_order[len(self.use_order) - len(last) :] == last:
            return self
        gone = frozenset(last)
        return replace(self, use_order=(*(n for n in self.use_order if n not in gone), *last))

    def with_placed(self, placed: Placed) -> Self:
        """Return contents whose placement remembers ``placed``, without what is of adapters that are gone."""
        return replace(self, placed=placed.without_stale(self.adapters))

    def by_last_use(self) -> dict[str, Binding]:
        """Return the adapters by name, least recently used first."""
        return {n: self.adapters[n] for n in self.use_order}

    def with_adapters(self, adapters: Mapping[str, Binding], order: tuple[str, ...]) -> Self:
        """Return contents with these adapters, and of what was remembered only what is of them."""
        return replace(self, adapters=adapters, use_order=order, placed=self.placed.without_stale(adapters))


class BankTable:
    """The present contents of a bank. Changes hold ``lock``; whoever reads takes ``contents`` once."""

    def __init__(self, placed: Placed) -> None:
        self.contents = BankContents(placed)
        self.lock = reset_after_fork(threading.RLock())


class Placement(ABC):
    """Bind the adapters of one bank to its program, keep them, and run rows with them.

    ``program`` is the program, or the package, that rows run. ``table`` holds the contents of the bank.
    """

    program: Any
    table: BankTable
    limits: Limits

    @abstractmethod
    def bind(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        """Return ``adapter`` bound to the program, and checked against the limits; nothing has changed.

        Raises what ``adaptc.swap`` raises, and ConfigError or CheckpointError for what rows cannot have.
        """

    def prepare_replacement(self, name: str, binding: Binding) -> Sequence[Any]:
        """Return what calls will need once ``binding`` has replaced the adapter ``name``, for :meth:`store`.

        Calls go on meanwhile, so none of them waits for it.
        """
        return ()

    @abstractmethod
    def store(
        self,
        contents: BankContents,
        name: str,
        binding: Binding,
        needed_names: Collection[str] = (),
        prepared: Sequence[Any] = (),
    ) -> BankContents:
        """Return ``contents`` with ``binding`` under ``name``, which may be taken. The caller holds the lock of the
        table, and puts them into it.

        Adapters called ``needed_names`` are not evicted for it. ``prepared``: of :meth:`prepare_replacement`. Raises
        ConfigError where there is no room.
        """

    @abstractmethod
    def select(self, selection: RowSelection) -> Runner:
        """Return a runner that keeps ``selection``, whatever the bank does."""

    @abstractmethod
    def check_call(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise AdaptcError where a call cannot have ``count`` entries of adapters, before any adapter is loaded."""

    @abstractmethod
    def warm(self, adapters: int | None) -> None:
        """Make now the code of calls with up to so many adapters. Raises ConfigError for what is no such number."""

    @abstractmethod
    def report(self, contents: BankContents) -> BankReport:
        """Return the report of a bank with ``contents``."""

    @abstractmethod
    def copy(self, memo: dict[int, Any] | None) -> Placement:
        """Return an empty placement on the same program; on a copy of it where ``memo`` is that of a deep copy.

        Raises AdaptcError where there can be only one.
        """

    @abstractmethod
    def pickle_error(self) -> AdaptcError:
        """Return the error of pickling the bank, which says what to do instead."""

    def export(self, adapters: Mapping[str, Binding]) -> ExportedProgram:
        """Return a plain exported program of these adapters. Raises AdaptcError where there is none."""
        raise AdaptcError("a package is compiled code, of which there is no exported program: export the bank itself")


def parts_error() -> AdaptcError:
    """Return the error of calling a bank whose program is called part by part."""
    return AdaptcError("this bank is of a program that is called part by part: call what it generates with")
