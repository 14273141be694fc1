"""Serve batches whose rows each use an adapter of their own, none, or a weighted mix.

A bank takes a program with adapter sites, and adapters that fit them. Each row of a call gets what a program with that
row's adapters alone would compute. A new adapter, a new rank or another assignment to rows compiles nothing. Code is
made at the first call, and for a call of more adapters than there is code for (see ``bank_code``).

A call reads one frozen :class:`Holdings`, which is replaced as a whole, so it keeps the adapters that it began with.

A call whose rows all want one adapter, or all the base, runs the program or its base directly, where that compiles
nothing. All others run code that takes coefficients (see ``rows``), on a stack of the adapters in use.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.bank_code import BankCode
from adaptc.bank.bank_report import BankReport, bytes_of
from adaptc.bank.base_program import bare_of, check_options
from adaptc.bank.capacity import Limits
from adaptc.bank.compile_bank import RowsSource
from adaptc.bank.holdings import Holdings
from adaptc.bank.row_adapters import Mixes, check_known, parse_row_adapters, used
from adaptc.bank.selection import Assigned, Stack
from adaptc.bank.stack_adapters import stacked
from adaptc.bank.warm_up import warm_bank
from adaptc.binding.binding import Binding
from adaptc.binding.sources.source import bind_adapter
from adaptc.errors import AdaptcError, ConfigError, did_you_mean, listing, shown
from adaptc.locks import free_in_children
from adaptc.runtime.dynamo_boundary import outside
from adaptc.runtime.executor import Executor
from adaptc.runtime.gpu_variants import check_triton, runs_on_gpu
from adaptc.runtime.mutated_buffers import own_copies
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore
from adaptc.tables import size
from adaptc.torch_modes import plainly


class Bank:
    """Adapters by name for the rows of a program's batches, made by ``AdaptedProgram.bank``.

    Iterating yields the names, least recently used first.
    """

    @plainly()
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
        check_options(options)
        self.limits = Limits(capacity, max_rank, max_bytes, evict)
        if loader is not None and not callable(loader):
            raise ConfigError(f"loader={shown(loader)} must be a function of a name that gives an adapter")
        self._program = program.snapshot()
        self.loader, self._probes = loader, probes
        #: the program without adapters, and its sites
        self.bare = bare_of(self._program)
        #: part -> where the rows of the batch are in it; a program that is called as a whole is the only part, ""
        self.sources = self._located()
        #: ids of the sites that fused GPU kernels compute
        self.grouped = self._groupable() if self._uses_kernels() else frozenset[str]()
        self.codes = BankCode(self.sources, self._program.options, self.limits, self.bare.training, self.grouped)
        #: FQN -> this bank's own copy of a tensor that calls write to (a cache, a counter)
        self.state: Mapping[str, Tensor] = own_copies(self.bare.base, self.bare.written)
        self._now = Holdings()
        self._lock = free_in_children(threading.RLock())
        self._called = outside(_called)
        if not isinstance(adapters or {}, Mapping):
            raise ConfigError(f"adapters={shown(adapters)} must be a dict of adapters by name")
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter, **options)

    def _located(self) -> Mapping[str, RowsSource]:
        return {"": RowsSource.of(self.bare, self._probes)}

    @property
    def source(self) -> RowsSource:
        """Return where the rows are, for a program that is called as a whole."""
        return self.sources[""]

    def _groupable(self) -> frozenset[str]:
        """Return the ids of the sites that GPU kernels can compute, in every part that a site is in."""
        refused = {a.id for s in self.sources.values() for a in s.attachments if a.id not in s.groupable}
        return frozenset(a.id for a in self.bare.attachments) - refused

    def _uses_kernels(self) -> bool:
        options = self._program.options
        if options.backend != "eager" or self.bare.training or options.kernels is False:
            return False
        if options.kernels:
            check_triton()
        return bool(options.kernels) or runs_on_gpu(self.bare.base.values())

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Add an adapter: a directory, a file, a state dict or a binding; ``options`` as for ``adaptc.swap``.

        Raises ConfigError for a name that is taken, or where the bank is full. Raises CheckpointError or SwapError for
        an adapter that does not fit, or is not finite. After an error the bank is unchanged.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {shown(name)}")
        if name in self._now.adapters:
            raise _taken(name)
        binding = self._binding(name, adapter, options)
        with self._lock:
            if name in self._now.adapters:
                raise _taken(name)
            self._now = self._with(self._now, name, binding)

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Replace the adapter called ``name`` by another one; arguments as for :meth:`add`.

        Raises AdaptcError for a name that the bank does not have. An adapter that does not fit, or for which there is
        no room, raises as in :meth:`add`. After an error the bank is unchanged.
        """
        check_known([name], self._now.adapters)
        binding = self._binding(name, adapter, options)
        with self._lock:
            check_known([name], self._now.adapters)
            self._now = self._with(self._now, name, binding)

    def remove(self, name: str) -> None:
        """Remove an adapter; calls that have begun keep it. Raises AdaptcError for a name that the bank does not
        have."""
        with self._lock:
            check_known([name], self._now.adapters)
            self._now = self._now.without([name])

    def _with(self, held: Holdings, name: str, binding: Binding, needed: Collection[str] = ()) -> Holdings:
        """Return ``held`` with one more adapter, and without those that the limits evict for it, never
        ``needed`` ones.

        Raises ConfigError where there is no room.
        """
        gone = self.limits.leaving(held.adapters, held.order, name, binding, needed)
        return held.with_adapter(name, binding, gone)

    def _binding(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        try:
            binding = bind_adapter(self._program, adapter, trainable=self.bare.training, **options)
            self.limits.check(name, binding, read=isinstance(adapter, (str, os.PathLike, Mapping)))
        except AdaptcError as error:
            error.add_note(f"It is adapter {name!r} of the bank.")
            raise
        return binding

    def __contains__(self, name: object) -> bool:
        return name in self._now.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._now.order)

    def __len__(self) -> int:
        return len(self._now.adapters)

    def __getitem__(self, name: str) -> Binding:
        """Return the adapter called ``name``, bound to the program. Raises KeyError where there is none."""
        held = self._now.adapters
        if name not in held:
            raise KeyError(f"the bank has no adapter {name!r}{did_you_mean(name, held)}")
        return held[name]

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Run the program. ``adapters`` has an entry for each row of the batch: a name, None for the base, or a dict of
        names and weights. A dict adds up the changes of its adapters, each times its weight.

        Raises AdaptcError for a name that the bank does not have, after the loader was asked. Raises AdaptcError where
        the batch has another number of rows than ``adapters``. In both cases nothing was computed.
        """
        return self._called(self, args, kwargs, adapters)

    def assigned(self, adapters: Any) -> Assigned:
        """Return a callable that keeps this assignment and these adapters, for the calls of a generation.

        It takes batches that have each row once, or each row equally many times in succession (beams).
        """
        mixes = parse_row_adapters(adapters)
        return self.keeping(mixes, self._needed(used(mixes)))

    def keeping(self, mixes: Mixes, table: Mapping[str, Binding]) -> Assigned:
        """Return a callable that keeps the assignment ``mixes`` and the adapters of ``table``, which need not be in the
        bank."""
        return Assigned(self._runs(mixes, table), mixes, self, self._program, table)

    def _needed(self, names: tuple[str, ...]) -> Mapping[str, Binding]:
        """Return the adapters that a call names, and note that they were used. The loader loads those that are missing.
        The call keeps them even if the bank drops them meanwhile.

        Raises AdaptcError for a name that neither the bank nor its loader has, ConfigError where the limits allow no
        more.
        """
        self.limits.check_call(names)
        table = self._now.adapters
        found = {n: table[n] for n in names if n in table}
        missing = [n for n in names if n not in found]
        if missing and self.loader is None:
            check_known(missing, table)
        loaded = {n: self._load(n) for n in missing}
        with self._lock:
            held = self._now
            for name, binding in loaded.items():
                if name not in held.adapters:  # else another thread was first
                    held = self._with(held, name, binding, names)
                found[name] = held.adapters[name]
            self._now = held.used(names)
        return found

    def _load(self, name: str) -> Binding:
        assert self.loader is not None
        found = self.loader(name)
        if found is None:
            raise AdaptcError(f"the bank has no adapter {name!r}, and its loader gave none{did_you_mean(name, self)}")
        return self._binding(name, found, {})

    def _runs(self, mixes: Mixes, table: Mapping[str, Binding]) -> Callable[..., Any] | Stack:
        """Return what computes an assignment: a callable where all rows want the base, or one adapter with weight 1;
        else a stack.

        It is a stack, too, where that callable would compile something, and for adapters that train.
        """
        names = used(mixes)
        if not self.bare.attachments or not (names or self._compiles(self._program.running.base)):
            return self._base()
        alone = bool(names) and all(mix == {names[0]: 1.0} for mix in mixes) and not self.bare.training
        if alone and not self._compiles(self._program):
            return self._alone(names[0], table)
        return self._stack(names, table)

    def _compiles(self, program: Any) -> bool:
        """Return whether calls of ``program`` would compile something; None stands for a base that nobody has made
        yet."""
        if not self.codes.compiles:
            return False
        if program is None or program.running.executor is None:
            return True
        return not all(code.compiled for code in self.codes_of(program))

    def _base(self) -> Callable[..., Any]:
        base: ProgramCore = self._program.base  # type: ignore[attr-defined]
        return self._with_state(base, Binding.none()) if self.state else base.pinned()

    def _with_state(self, program: ProgramCore, binding: Binding) -> Callable[..., Any]:
        """Return a callable that runs ``program`` with ``binding`` on the buffers of the bank."""
        code = program.executor()
        arguments = code.own_arguments(binding, self.state)
        return lambda *args, **kwargs: code(arguments, args, kwargs)

    def _alone(self, name: str, table: Mapping[str, Binding]) -> Callable[..., Any]:
        return self._with_state(self._program, table[name]) if self.state else self._bound_to(name, table)

    def _bound_to(self, name: str, table: Mapping[str, Binding]) -> Bound:
        found = self._now.bound.get(name)
        if found is None or found.binding is not table[name]:
            found = Bound(self._program, table[name])
            with self._lock:
                self._now = self._now.with_bound(name, found)
        return found

    def _stack(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> Stack:
        kept = self._now.stacks
        found = next((s for s in reversed(kept) if not names or s.serves(names, table)), None)
        if found is None:
            members = tuple(table[n] for n in names)
            found = self._stacked(names, members, self.codes.count(len(names)))
        # A kept stack would miss the optimizer's updates of adapters that train, so their stack is made in every call.
        if not self.bare.training:
            with self._lock:
                self._now = self._now.with_stack(found)
        return found

    def _stacked(self, names: tuple[str, ...], members: tuple[Binding, ...], count: int) -> Stack:
        source, like = self.bare, members or (self._program.binding,)
        # A stack of adapters that train is not kept, and the caller's transforms and modes must see how it is made.
        with nullcontext() if source.training else plainly():
            return Stack(names, members, count, stacked(like, source.attachments, source.ops, count, self.grouped))

    def empty_stack(self, count: int) -> Stack:
        """Return a stack with ``count`` places that holds no adapter of the bank, for making code."""
        return self._stacked((), (), count)

    def code(self, stack: Stack, long: bool) -> Executor:
        """Return the code of calls on ``stack``, made at the first such call. ``long``: as for :meth:`BankCode.of`."""
        return self.codes.of("", stack, long)

    def codes_of(self, program: ProgramCore) -> list[Executor]:
        """Return the code of calls of ``program``, made now if it was not."""
        return [program.executor()]

    def warm(self, adapters: int | None = None) -> None:
        """Make now all code that calls of up to ``adapters`` adapters need, so that no call waits for it.

        None stands for the capacity, or without one for the adapters in the bank, at least two. Other calls go on
        meanwhile. Raises ConfigError for anything but a number from 1 to the capacity.
        """
        warm_bank(self, adapters)

    @property
    def device(self) -> torch.device:
        return self._program.device

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int | None:
        """Return how many adapters the bank may hold; None for any number."""
        return self.limits.capacity

    @property
    def max_rank(self) -> int | None:
        """Return the largest rank; None for any."""
        return self.limits.max_rank

    @property
    def program(self) -> ProgramCore:
        """Return the program, as it was when the bank was made."""
        return self._program

    @property
    def adapters(self) -> Mapping[str, Binding]:
        """Return the present adapters by name."""
        return self._now.adapters

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """Return a plain exported program of these adapters, or of all for None, in which nothing of adaptc is left.

        It takes one more keyword, ``adapter_coefficients``: float32 (rows, adapters), with the adapters in the order
        given. Raises AdaptcError for a name that the bank does not have, ConfigError where there is no adapter.
        """
        table = self._now.adapters
        if isinstance(adapters, str) or not all(isinstance(n, str) for n in adapters or ()):
            raise ConfigError(f"adapters={shown(adapters)} must be a list of names, or None for all adapters")
        names = tuple(table) if adapters is None else tuple(adapters)
        check_known(names, table)
        if not names:
            raise ConfigError("the bank is empty, so there is nothing to export")
        made = stacked([table[n] for n in names], self.bare.attachments, self.bare.ops, len(names))
        # Slots in a stack are strided views; archives want contiguous tensors.
        made = replace(made, values={f: t.detach().contiguous() for f, t in made.values.items()})
        return self.source.exported(made, len(names))

    @property
    def nbytes(self) -> int:
        """Return the bytes of all adapters."""
        return bytes_of(self._now.adapters.values())

    @property
    def held(self) -> int:
        """Return the bytes of the stacks kept."""
        return sum(s.nbytes for s in self._now.stacks)

    def report(self) -> BankReport:
        """Return a table of the adapters with their sites, ranks and bytes, and the stacks that the bank keeps."""
        now = self._now
        adapters = {n: now.adapters[n] for n in now.order}
        held, stacks = sum(s.nbytes for s in now.stacks), tuple(s.names for s in now.stacks)
        return BankReport(adapters, held, stacks, self.limits.capacity, self.limits.max_bytes)

    def __repr__(self) -> str:
        limits = f" of {self.limits.capacity}" if self.limits.capacity else ""
        names = f": {listing(map(repr, self._now.adapters))}" if len(self) else ""
        return f"<Bank: {len(self)}{limits} adapters, {size(self.nbytes)}{names}>"

    def __copy__(self) -> Bank:
        """Return a bank with the same adapters and the program's buffers; adding to one does not change the other."""
        return self._like(self._program, dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """Return a bank with tensors of its own, whose buffers continue from what this bank's calls wrote."""
        made = self._like(copy.deepcopy(self._program, memo), partial(copy.deepcopy, memo=memo))
        made.state = own_copies(self.state, self.state)
        return made

    def _like(self, program: ProgramCore, adapters: Callable[[dict[str, Binding]], dict[str, Binding]]) -> Bank:
        now = self._now
        held = {n: now.adapters[n] for n in now.order}
        limits = {f.name: getattr(self.limits, f.name) for f in fields(self.limits)}
        return self._again(program, adapters(held), loader=self.loader, probes=self._probes, **limits)

    def _again(self, program: ProgramCore, adapters: Mapping[str, Any], **options: Any) -> Bank:
        return Bank(program, adapters, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a bank cannot be pickled: write its program with adaptc.save, its adapters with adaptc.save_adapter, and "
            "make another where they are read; copy.deepcopy(bank) gives one with tensors of its own"
        )


def _taken(name: str) -> ConfigError:
    return ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")


def _called(bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Any) -> Any:
    bank.source.check_call(len(parse_row_adapters(adapters)), args, kwargs)
    return bank.assigned(adapters).run(args, kwargs)
