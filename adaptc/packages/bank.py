"""Run the package of a bank: each row of a batch on its own mix of the adapters in it, and others put in their places.

Before: a file that ``packages.write_bank`` wrote. After: calls compute what the bank did. An adapter that is put in is
copied to its place between two calls, one pass over its bytes; nothing is compiled, and no call sees a part of it. What
a call that has begun uses, or a generation, stays where it is until that has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, listing, shown
from adaptc.packages.assigned import PackagedAssignment
from adaptc.packages.constants import Fitted
from adaptc.packages.run import PackagedProgram
from adaptc.rows.assignment import check_known, mixes_of, used
from adaptc.rows.report import BankReport


class PackagedBank:
    """Made by ``adaptc.load_package``."""

    def __init__(self, package: PackagedProgram) -> None:
        assert package.manifest.bank is not None
        self._package = package
        self.capacity: int = package.manifest.bank["count"]
        self._places: Mapping[str, int] = {n: k for k, n in enumerate(package.manifest.bank["names"])}
        self._members: dict[str, Binding] = {n: package.member(k) for n, k in self._places.items()}
        self._each = sum(prod(r.shape) * r.dtype.itemsize for r in package.manifest.rooms.values())
        self._lock = threading.RLock()
        self._assigned: WeakSet[PackagedAssignment] = WeakSet()

    @property
    def path(self) -> Path:
        return self._package.path

    @property
    def device(self) -> torch.device:
        return self._package.device

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank an adapter may have at each site that has one, by the FQN of the site's parameter."""
        return self._package.ranks

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """As :meth:`Bank.__call__`."""
        if self._package.manifest.parts:
            raise AdaptcError("this bank is of a program that is called part by part: call what it generates with")
        chosen = self.assigned(adapters)
        return chosen.run(args, kwargs, len(chosen.mixes))

    def assigned(self, adapters: Any) -> PackagedAssignment:
        """As :meth:`Bank.assigned`. While it is there, the places of its adapters are no other's."""
        mixes = mixes_of(adapters)
        with self._lock:
            names = used(mixes)
            check_known(names, self._places)
            own = {n: self._members[n] for n in names}
            made = PackagedAssignment(self._package, mixes, self._places, self.capacity, own)
            self._assigned.add(made)
            return made

    def _free(self, name: str) -> int:
        """A place for an adapter."""
        kept = {place for one in self._assigned for place in one.taken}
        free = sorted(set(range(self.capacity)) - set(self._places.values()) - kept)
        if not free:
            goes_on = len(kept - set(self._places.values()))
            raise ConfigError(
                f"the bank has no room for {name!r}: the package was made for {self.capacity} adapters"
                + (f", and generations that go on keep {goes_on} that are gone" if goes_on else "")
                + ". Remove one, or package the bank with a larger capacity"
            )
        return free[0]

    def _used(self, place: int) -> bool:
        return any(place in one.taken for one in self._assigned)

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Put an adapter in a free place; as :meth:`Bank.add`, for ranks up to :attr:`ranks`. Raises ConfigError where
        there is no free place."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {shown(name)}")
        fitted = self._package.fitted(adapter, **options)
        with self._lock:
            if name in self._places:
                raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")
            self._put(name, self._free(name), fitted)

    def _put(self, name: str, place: int, fitted: Fitted) -> None:
        self._package.write(place, fitted.constants)
        self._places = {**self._places, name: place}
        self._members[name] = replace(fitted, constants={})

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Put another adapter in the place of one; as :meth:`add`, which takes a free place where calls that have begun
        keep this one."""
        check_known([name], self._places)
        fitted = self._package.fitted(adapter, **options)
        with self._lock:
            check_known([name], self._places)
            place = self._places[name]
            self._put(name, self._free(name) if self._used(place) else place, fitted)

    def remove(self, name: str) -> None:
        """Let go of an adapter. Raises AdaptcError for a name that there is not."""
        with self._lock:
            check_known([name], self._places)
            if not self._used(self._places[name]):
                self._package.write(self._places[name], None)
            self._places = {n: k for n, k in self._places.items() if n != name}
            del self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def report(self) -> BankReport:
        """The adapters in it, each with the bytes of its place."""
        return BankReport(dict(self._members), capacity=self.capacity, each=self._each)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"the package of a bank can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def __repr__(self) -> str:
        return f"PackagedBank({str(self.path)!r}, {len(self)} of {self.capacity} adapters: {listing(map(repr, self))})"
