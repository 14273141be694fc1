"""Run the package of a bank, with per-row adapters, and add, replace and remove its adapters.

Calls of a file that ``packages.write_bank`` wrote compute what the bank did. An adapter that is added is copied to a
place in the code between two calls, one pass over its bytes. Nothing is compiled, and no call sees a part of it.
Adapters that a call or a generation uses stay in their places until it has ended. One table says which adapters there
are, and where. It is replaced as a whole, after a place that is in no table was written to.

:class:`PackagedAssignment` assigns the adapters of a packaged bank to the rows of a batch, for calls that belong
together. It has the mix of adapters of each row, and the place of each adapter in the compiled code. While it exists
the bank puts nothing else in these places. So a generation ends with the adapters it began with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from adaptc.bank.bank_report import BankReport
from adaptc.bank.compile_bank import KEYWORD
from adaptc.bank.row_adapters import Mixes, check_known, coefficients, parse_row_adapters, used
from adaptc.bank.selection import Assignment, repeated
from adaptc.bank.warm_up import most_of
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, listing, shown
from adaptc.locks import free_in_children
from adaptc.packages.constants import Fitted
from adaptc.packages.manifest import Input
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.state.program_parts import ProgramPart


@dataclass(frozen=True, eq=False)
class Placed:
    """An adapter of a bank, and its place in the code."""

    place: int
    member: Binding


class PackagedBank:
    """The package of a bank, called with adapters for each row; ``adaptc.load_package`` makes it."""

    def __init__(self, package: PackagedProgram) -> None:
        assert package.manifest.bank is not None
        self._package = package
        self.capacity: int = package.manifest.bank["count"]
        names = package.manifest.bank["names"]
        self._now: Mapping[str, Placed] = {n: Placed(k, package.member(k)) for k, n in enumerate(names)}
        self._each = sum(prod(r.shape) * r.dtype.itemsize for r in package.manifest.rooms.values())
        self._lock = free_in_children(threading.RLock())
        self._assigned: WeakSet[PackagedAssignment] = WeakSet()
        #: the names of adapters whose places may hold a mix of two adapters' values, after interrupts
        self._torn: frozenset[str] = frozenset()

    @property
    def path(self) -> Path:
        return self._package.path

    @property
    def device(self) -> torch.device:
        return self._package.device

    @property
    def ranks(self) -> dict[str, int]:
        """Return the largest rank that an adapter may have at each site with a rank, by the FQN of its parameter."""
        return self._package.ranks

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Run a batch; ``adapters`` names those of each row, as for :meth:`Bank.__call__`.

        Raises AdaptcError where the program is called part by part.
        """
        if self._package.manifest.parts:
            raise AdaptcError("this bank is of a program that is called part by part: call what it generates with")
        chosen = self.assigned(adapters)
        return chosen.run(args, kwargs, len(chosen.mixes))

    def assigned(self, adapters: Any) -> PackagedAssignment:
        """Return a callable that keeps these adapters for its rows; ``adapters`` is as for :meth:`Bank.assigned`.

        While it exists, no other adapter is written to the places of its adapters. Raises AdaptcError for a name that
        the bank does not have, and for an adapter that two interrupts of :meth:`replace` left incomplete.
        """
        mixes = parse_row_adapters(adapters)
        with self._lock:
            names, now = used(mixes), self._now
            check_known(names, now)
            if torn := self._torn & {*names}:
                raise AdaptcError(
                    f"the adapter {min(torn)!r} is not whole, since bank.replace was interrupted twice: call it again"
                )
            places, own = {n: now[n].place for n in names}, {n: now[n].member for n in names}
            made = PackagedAssignment(self._package, mixes, places, self.capacity, own)
            self._assigned.add(made)
            return made

    def _free(self) -> int | None:
        """Return a place that no adapter of the bank and no assignment uses; None where there is none."""
        taken = {one.place for one in self._now.values()} | self._kept()
        return next((k for k in range(self.capacity) if k not in taken), None)

    def _kept(self) -> set[int]:
        """Return the places that assignments keep."""
        return {place for one in self._assigned for place in one.taken}

    def _no_room(self, name: str) -> ConfigError:
        goes_on = len(self._kept() - {one.place for one in self._now.values()})
        return ConfigError(
            f"the bank has no room for {name!r}: the package was made for {self.capacity} adapters"
            + (f", and generations that go on keep {goes_on} that are gone" if goes_on else "")
            + ". Remove one, or package the bank with a larger capacity"
        )

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Add an adapter to the bank, in a free place; its ranks may be up to :attr:`ranks`.

        Options are those of :meth:`PackagedProgram.fitted`. Raises ConfigError where there is no free place, or where
        the bank has the name, and whatever :meth:`PackagedProgram.swap` raises.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {shown(name)}")
        fitted = self._package.fitted(adapter, **options)
        with self._lock:
            if name in self._now:
                raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")
            self._put(name, self._free(), fitted)

    def _put(self, name: str, place: int | None, fitted: Fitted) -> None:
        if place is None:
            raise self._no_room(name)
        new = {**self._now, name: Placed(place, replace(fitted, constants={}))}
        self._package.write(place, fitted.constants)
        self._now = new
        self._torn -= {name}

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Replace the adapter called ``name`` by another.

        It goes to a free place where there is one, so calls that have begun keep the old one. Without a free place it
        is written over the old one, or ConfigError is raised where an assignment keeps that. Options and further errors
        are those of :meth:`add`.
        """
        check_known([name], self._now)
        fitted = self._package.fitted(adapter, **options)
        with self._lock:
            check_known([name], self._now)
            own, place = self._now[name].place, self._free()
            if place is None and own not in self._kept():
                self._write_over(name, own, fitted)
            else:
                self._put(name, place, fitted)

    def _write_over(self, name: str, place: int, fitted: Fitted) -> None:
        """Write an adapter over the one called ``name``, since no other place is free.

        The first byte destroys the old values, so a write that is interrupted is done again to its end. Where that is
        interrupted too, the adapter is refused from then on.
        """
        new = {**self._now, name: Placed(place, replace(fitted, constants={}))}
        whole = self._torn - {name}
        try:
            self._torn = whole | {name}
            self._package.write(place, fitted.constants)
            self._now, self._torn = new, whole
        except BaseException:
            self._package.write(place, fitted.constants)
            self._now, self._torn = new, whole
            raise

    def remove(self, name: str) -> None:
        """Remove an adapter from the bank. Raises AdaptcError for a name that the bank does not have."""
        with self._lock:
            check_known([name], self._now)
            self._now = {n: one for n, one in self._now.items() if n != name}
            self._torn -= {name}

    def warm(self, adapters: int | None = None) -> None:
        """Check ``adapters`` as :meth:`Bank.warm` does; nothing is left to make, since all code was compiled ahead.

        Raises ConfigError for what is no number of adapters that a call may name.
        """
        most_of(adapters, self.capacity, len(self))

    def __contains__(self, name: object) -> bool:
        return name in self._now

    def __iter__(self) -> Iterator[str]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)

    def report(self) -> BankReport:
        """Return the report of the adapters in it, each with the bytes of its place."""
        return BankReport({n: one.member for n, one in self._now.items()}, capacity=self.capacity, each=self._each)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"the package of a bank can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def __repr__(self) -> str:
        return f"PackagedBank({str(self.path)!r}, {len(self)} of {self.capacity} adapters: {listing(map(repr, self))})"


class PackagedAssignment(Assignment):
    """A callable that runs a packaged bank with per-row adapters; ``PackagedBank.assigned`` makes it.

    ``places`` maps the name of each adapter to its place. ``count`` is the number of places in the code.
    """

    def __init__(
        self,
        package: PackagedProgram,
        mixes: Mixes,
        places: Mapping[str, int],
        count: int,
        adapters: Mapping[str, Binding],
    ) -> None:
        super().__init__(mixes, package, adapters)
        self._package, self._count, self._places = package, count, places
        self._names = used(mixes)
        self._at = [places[n] for n in self._names]
        #: the places that no other adapter may be put in
        self.taken = frozenset(self._at)

    def alone(self, name: str) -> PackagedAssignment:
        return PackagedAssignment(self._package, ({name: 1.0},), self._places, self._count, self.adapters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs, self._rows(self._package.manifest.inputs, kwargs))

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> Any:
        """Run a call with so many rows."""
        return self._package.run(None, args, {**kwargs, KEYWORD: self._coefficients(rows)})

    def parts(self, scale: Any = None) -> Mapping[str, ProgramPart]:
        """Return the parts of the package with these adapters, by name. Raises ConfigError for a ``scale``."""
        self._keeps(scale)
        parts, inputs = self._package.parts_with(None), self._package.manifest.parts
        return {
            n: ProgramPart(partial(self._part, p, inputs[n].inputs), {*p.inputs} - {KEYWORD}) for n, p in parts.items()
        }

    def _part(self, part: ProgramPart, inputs: Sequence[Input], **kwargs: Any) -> dict[str, Tensor]:
        return part.run(**kwargs, **{KEYWORD: self._coefficients(self._rows(inputs, kwargs))})

    def _rows(self, inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> int:
        """Return how many rows a call has: as its inputs tell, else as many as the assignment."""
        shapes = {i.name: i.tensor.shape for i in inputs if i.tensor is not None}
        size = shapes[KEYWORD][0]
        if isinstance(size, int):
            return size
        for name, shape in shapes.items():
            if size in shape and isinstance(value := kwargs.get(name), Tensor) and value.ndim == len(shape):
                return value.shape[shape.index(size)]
        return len(self.mixes)

    def _coefficients(self, rows: int) -> Tensor:
        c = torch.zeros(rows, self._count)
        c[:, self._at] = coefficients(repeated(self.mixes, rows), self._names, len(self._names), torch.device("cpu"))
        return c.to(self.device)

    @property
    def device(self) -> torch.device:
        return self._package.device
