"""A bank: adapters by name, of which each row of a batch takes one, none, or a mix.

Before: a program with adapter sites, and adapters that fit them. After: a callable whose rows compute what programs of
their own would. Adapters come and go while calls run: what a call reads is one frozen table, which is replaced as a
whole, so a call that has begun keeps the adapters it began with. Nothing is compiled anew for another adapter, another
rank or another assignment.

Calls in which all rows want the same run the program, or its base, as they are. All others run code with coefficients
(see ``rows``), on a stack of the adapters in use, which is kept for the next call: the bank holds its adapters, and
beside them the stacks that were used last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding
from adaptc.binding.source import as_binding
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, did_you_mean, listing, shown
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.ir.exclusive import GRAPHS
from adaptc.program.assigned import Assigned
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.program.unload import unloaded
from adaptc.rows.assignment import Mixes, check_known, mixes_of, used
from adaptc.rows.code import RowsSource
from adaptc.rows.report import BankReport, bytes_of
from adaptc.rows.stacks import Stack, stacked
from adaptc.runtime.executor import Executor
from adaptc.tables import size

#: stacks that are kept: of the calls that differ most from each other in what they use
STACKS = 2


class Bank:
    """Made by ``AdaptedProgram.bank``. Iterating gives the names, in the order of their last use."""

    def __init__(
        self,
        program: ProgramCore,
        adapters: Mapping[str, Any] | None = None,
        *,
        capacity: int | None = None,
        max_rank: int | None = None,
        max_bytes: int | None = None,
        evict: bool = False,
        loader: Callable[[str], Any] | None = None,
        probes: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        for name, value in {"capacity": capacity, "max_rank": max_rank, "max_bytes": max_bytes}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={shown(value)} must be a positive integer, or None for no limit")
        if loader is not None and not callable(loader):
            raise ConfigError(f"loader={shown(loader)} must be a function of a name that gives an adapter")
        self._program = program.snapshot()
        self.capacity, self.max_rank, self.max_bytes = capacity, max_rank, max_bytes
        self.evict, self.loader = evict, loader
        self._source = _source_of(self._program, probes)
        self._table: Mapping[str, Binding] = {}
        self._order: OrderedDict[str, None] = OrderedDict()
        self._codes: dict[tuple[int, bool], Executor] = {}
        self._stacks: OrderedDict[int, Stack] = OrderedDict()
        self._bound: dict[str, Bound] = {}
        self._lock = threading.RLock()
        if not isinstance(adapters or {}, Mapping):
            raise ConfigError(f"adapters={shown(adapters)} must be a dict of adapters by name")
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter, **options)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Take in an adapter: a directory, a file, a state dict or a binding; ``options`` as for ``adaptc.swap``.

        Raises ConfigError for a name that is taken, or where the bank is full; CheckpointError or SwapError for an
        adapter that does not fit, or is not finite. Then the bank is as it was.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {shown(name)}")
        if name in self._table:
            raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")
        self._put(name, self._binding(name, adapter, options))

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Put another adapter in the place of one; as :meth:`add`."""
        check_known([name], self._table)
        self._put(name, self._binding(name, adapter, options), known=True)

    def remove(self, name: str) -> None:
        """Let go of an adapter. Calls that have begun keep it. Raises AdaptcError for a name that there is not."""
        with self._lock:
            check_known([name], self._table)
            self._drop([name])

    def _put(self, name: str, binding: Binding, known: bool = False) -> None:
        with self._lock:
            if known:
                check_known([name], self._table)
            elif name in self._table:
                raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")
            gone = self._make_room(name, binding)
            self._drop(gone)
            self._table = {**self._table, name: binding}
            self._order[name] = None
            self._order.move_to_end(name)
            self._forget([name])

    def _make_room(self, name: str, binding: Binding) -> list[str]:
        """Whom to let go for another adapter."""
        others = [n for n in self._order if n != name]
        gone: list[str] = []

        def over() -> str:
            rest = [n for n in others if n not in gone]
            if self.capacity is not None and len(rest) + 1 > self.capacity:
                return f"it holds {self.capacity} adapters"
            needed = bytes_of([*(self._table[n] for n in rest), binding])
            if self.max_bytes is not None and needed > self.max_bytes:
                return f"it holds {size(self.max_bytes)}, and would need {size(needed)}"
            return ""

        while full := over():
            rest = [n for n in others if n not in gone]
            if not self.evict or not rest:
                raise ConfigError(
                    f"the bank has no room for {name!r}: {full}. Remove one, make the bank larger, or let it give up "
                    "those that were used least recently, with evict=True"
                )
            gone.append(rest[0])
        return gone

    def _drop(self, names: list[str]) -> None:
        self._table = {n: b for n, b in self._table.items() if n not in names}
        for name in names:
            self._order.pop(name, None)
        self._forget(names)

    def _forget(self, names: list[str]) -> None:
        """Stacks that hold what is no longer in the bank."""
        for name in names:
            self._bound.pop(name, None)
        for key, stack in list(self._stacks.items()):
            own = zip(stack.names, stack.members, strict=True)
            if any(self._table.get(n) is not b for n, b in own):
                del self._stacks[key]

    def _binding(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        binding = as_binding(self._program, adapter, trainable=self._source.training, **options)
        if binding.base:
            raise CheckpointError(
                f"adapter {name!r} brings a base of its own ({listing(map(repr, binding.base), 2)}), which rows of one "
                "batch cannot have: convert it to plain LoRA first, with adaptc.convert_to_lora"
            )
        if len(binding.parts) > 1:
            raise ConfigError(
                f"adapter {name!r} is {len(binding.parts)} adapters that act together: add each of them, and give rows "
                "a mix"
            )
        for fqn, t in binding.values.items():
            if (t.is_floating_point() or t.is_complex()) and not bool(torch.isfinite(t).all()):
                raise CheckpointError(f"adapter {name!r} is not finite: {fqn!r} has NaN or infinity")
        ranks = [r for m in binding.methods.values() if (r := m.rank()) is not None]
        if self.max_rank is not None and max(ranks, default=0) > self.max_rank:
            raise ConfigError(f"adapter {name!r} has rank {max(ranks)}, and the bank takes ranks up to {self.max_rank}")
        return binding

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._order))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, name: str) -> Binding:
        """The adapter of that name, bound to the program. Raises KeyError where there is none."""
        found = self._table.get(name)
        if found is None:
            raise KeyError(f"the bank has no adapter {name!r}{did_you_mean(name, self._table)}")
        return found

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any, **kwargs: Any) -> Any:
        """Run the program. ``adapters`` has an entry for each row of the batch: a name, None for the base, or a dict of
        names and weights, whose changes are added up with these weights.

        Raises AdaptcError for a name that the bank has not (after the loader was asked), and for another number of rows
        than the batch has; then nothing was computed.
        """
        assigned = self.assigned(adapters)
        self._check_rows(len(assigned.mixes), args, kwargs)
        return assigned(*args, **kwargs)

    def assigned(self, adapters: Any) -> Assigned:
        """A callable that keeps this assignment and these adapters, for calls that belong together: a generation. It
        takes batches in which each row is there once, or so many times after each other (beams)."""
        mixes = mixes_of(adapters)
        return Assigned(self, mixes, self._runs(mixes, self._needed(used(mixes))))

    def _needed(self, names: tuple[str, ...]) -> Mapping[str, Binding]:
        """The table that a call reads, with all that it names."""
        missing = [n for n in names if n not in self._table]
        if missing and self.loader is None:
            check_known(missing, self._table)
        for name in missing:
            self._load(name)
        with self._lock:
            table = self._table
            check_known(names, table)  # two that cannot be held at once
            for name in names:
                self._order.move_to_end(name)
            return table

    def _load(self, name: str) -> None:
        assert self.loader is not None
        found = self.loader(name)
        if found is None:
            check_known([name], self._table)
        binding = self._binding(name, found, {})
        with self._lock:
            if name not in self._table:  # another thread was first
                self._put(name, binding)

    def _runs(self, mixes: Mixes, table: Mapping[str, Binding]) -> Callable[..., Any] | Stack:
        """What computes an assignment: where all rows want the same a program of its own, else a stack."""
        names = used(mixes)
        if not names:
            return self._program.base.pinned()  # type: ignore[attr-defined]
        if all(mix == {names[0]: 1.0} for mix in mixes) and not self._source.training:
            return self._alone(names[0], table)
        return self._stack(names, table)

    @property
    def axis(self) -> int:
        """That of the rows in :meth:`first`."""
        return self._source.rows.of[1]

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The input of a call whose sizes say the number of rows; None where it is inside of another."""
        name, names = self._source.rows.of[0], list(self._source.takes)
        value = kwargs.get(name)
        if value is None and name in names and names.index(name) < len(args):
            value = args[names.index(name)]
        return value if isinstance(value, Tensor) and value.ndim > self.axis else None

    def _alone(self, name: str, table: Mapping[str, Binding]) -> Bound:
        with self._lock:
            found = self._bound.get(name)
            if found is None or found.binding is not table[name]:
                found = Bound(self._program, table[name])
                if self._table.get(name) is table[name]:
                    self._bound[name] = found
            return found

    def _stack(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> Stack:
        with self._lock:
            for key, stack in self._stacks.items():
                if stack.serves(names, table):
                    self._stacks.move_to_end(key)
                    return stack
        count = self._count(len(names))
        members = tuple(table[n] for n in names)
        source = self._source
        made = stacked(members, source.attachments, source.ops, count)
        stack = Stack(names, members, count, made)
        with self._lock:
            # Of adapters that train a stack is made in every call, for it must follow them.
            if not source.training and all(self._table.get(n) is b for n, b in zip(names, members, strict=True)):
                self._stacks[id(stack)] = stack
                while len(self._stacks) > STACKS:
                    self._stacks.popitem(last=False)
        return stack

    def _count(self, needed: int) -> int:
        """The number of places of a stack: compiled code has one, for as many as the bank may hold."""
        options = self._program.options
        if options.backend == "inductor":
            return max(self.capacity or 8, needed, 2)
        most = max(needed, 2)
        return most if most <= 8 else -(-most // 4) * 4

    def code(self, stack: Stack, long: bool) -> Executor:
        """What computes calls on a stack, of ``long`` rows or short ones; made at the first such call."""
        options = self._program.options
        long = long and options.backend == "eager" and not self._source.training
        key = stack.count, long
        code = self._codes.get(key)
        if code is None:
            with GRAPHS:
                code = self._codes.get(key)
                if code is None:
                    code = self._codes[key] = self._source.code(stack.binding, stack.count, options, long)
        return code

    def _check_rows(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = self.first(args, kwargs)
        if first is not None and first.shape[self.axis] != count:
            raise AdaptcError(
                f"adapters has {count} entries, and {self._source.rows.of[0]!r} has {first.shape[self.axis]} rows: "
                "give one for each row, None for the base"
            )

    @property
    def device(self) -> torch.device:
        return self._program.device

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def program(self) -> ProgramCore:
        """The program, as it was when the bank was made."""
        return self._program

    @property
    def source(self) -> RowsSource:
        """What code for rows is made of."""
        return self._source

    @property
    def adapters(self) -> Mapping[str, Binding]:
        """The adapters by name, as they are now."""
        return self._table

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """A plain exported program of these adapters (all by default), which takes their coefficients, a float32 tensor
        (rows, adapters) in this order, as one more keyword, ``adapter_coefficients``. Nothing of adaptc is in it."""
        table = self._table
        names = tuple(table) if adapters is None else tuple(adapters)
        check_known(names, table)
        if not names:
            raise ConfigError("the bank is empty, so there is nothing to export")
        count = max(len(names), 2)
        made = stacked([table[n] for n in names], self._source.attachments, self._source.ops, count)
        return self._source.exported(made, count)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters; what several share counts once."""
        return bytes_of(self._table.values())

    @property
    def held(self) -> int:
        """Bytes of the stacks that are kept."""
        with self._lock:
            return sum(s.nbytes for s in self._stacks.values())

    def report(self) -> BankReport:
        """A table of the adapters with their sites, ranks and bytes, and what calls keep beside them."""
        with self._lock:
            adapters = {n: self._table[n] for n in self._order}
            stacks = tuple(s.names for s in self._stacks.values())
            return BankReport(adapters, self.held, stacks, self.capacity, self.max_bytes)

    def __repr__(self) -> str:
        limits = f" of {self.capacity}" if self.capacity else ""
        return f"<Bank: {len(self)}{limits} adapters, {size(self.nbytes)}: {listing(map(repr, self._table))}>"


def _source_of(program: ProgramCore, probes: Sequence[Mapping[str, Any]]) -> RowsSource:
    a = program.adaptation
    if not a.attachments:
        raise ConfigError("the program has no adapter sites, so there is nothing for a bank: compile it with a config")
    with GRAPHS:
        if a.training:
            bare: ExportedProgram = Unload({k: program.base_tensors[k] for k in program.originals})(program).output
        else:
            bare = unloaded(program)
        base = program.base_tensors
        return RowsSource.of(bare, a.attachments, program.ops, base, a.fills, a.takes, a.training, probes)
