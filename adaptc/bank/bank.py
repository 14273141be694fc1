"""Serve batches whose rows each use an adapter of their own, none, or a weighted mix.

A bank takes a program with adapter sites, and adapters that fit them. Each row of a call gets what a program with that
row's adapters alone would compute. A new adapter, a new rank or another selection for rows compiles nothing. Code is
made at the first call, and for a call of more adapters than there is code for (see ``bank_code``).

A call reads one frozen :class:`BankContents`, which is replaced as a whole, so it keeps the adapters that it began
with.

A call whose rows all want one adapter, or all the base, runs the program or its base directly, where that compiles
nothing. All others run code that takes coefficients (see ``rows``), on a stack of the adapters in use.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.bank_code import BankCode, find_kernel_sites
from adaptc.bank.base_program import check_bank_options, take_base_program
from adaptc.bank.capacity import Limits
from adaptc.bank.compile_bank import RowProgram
from adaptc.bank.holdings import BankContents, BankView
from adaptc.bank.row_adapters import Mixes, adapter_names_in, check_adapter_names, parse_row_adapters
from adaptc.bank.selection import AdapterStack, ProgramSelection
from adaptc.bank.stack_adapters import stack_adapters
from adaptc.bank.warm_up import warm_bank
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, did_you_mean, short_repr
from adaptc.locks import reset_after_fork
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.executor import Executor
from adaptc.runtime.mutated_buffers import copy_sharing_memory
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore
from adaptc.torch_modes import outside_modes


class Bank(BankView):
    """Adapters by name for the rows of a program's batches, made by ``AdaptedProgram.bank``.

    Iterating yields the names, least recently used first.

    Example:
        >>> bank = prog.bank({"fr": lora_weights(seed=0)[1], "de": lora_weights(seed=1)[1]})
        >>> bank(x, adapters=["fr", {"de": 0.7, "fr": 0.3}]).shape
        torch.Size([2, 3])
    """

    @outside_modes()
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
        check_bank_options(options)
        self.limits = Limits(capacity, max_rank, max_bytes, evict)
        if loader is not None and not callable(loader):
            raise ConfigError(f"loader={short_repr(loader)} must be a function of a name that gives an adapter")
        self._program = program.snapshot()
        self.loader, self._probes = loader, probes
        #: the program without adapters, and its sites
        self.base_program = take_base_program(self._program)
        #: part -> where the rows of the batch are in it; a program that is called as a whole is the only part, ""
        self.row_programs = self._find_rows()
        #: ids of the sites that fused GPU kernels compute
        self.kernel_sites = find_kernel_sites(self.base_program, self.row_programs, self._program.options)
        self.code_cache = BankCode(
            self.row_programs, self._program.options, self.limits, self.base_program.training, self.kernel_sites
        )
        #: FQN -> this bank's own copy of a tensor that calls write to (a cache, a counter)
        self.state: Mapping[str, Tensor] = copy_sharing_memory(
            self.base_program.base, self.base_program.written_tensors
        )
        self._contents = BankContents()
        self._lock = reset_after_fork(threading.RLock())
        self._untraced_call = not_traced(_call)
        if not isinstance(adapters or {}, Mapping):
            raise ConfigError(f"adapters={short_repr(adapters)} must be a dict of adapters by name")
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter, **options)

    def _find_rows(self) -> Mapping[str, RowProgram]:
        return {"": RowProgram.locate_rows(self.base_program, self._probes)}

    @property
    def row_program(self) -> RowProgram:
        """Return where the rows are, for a program that is called as a whole."""
        return self.row_programs[""]

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        """Add an adapter. After an error the bank is unchanged.

        Args:
            name: its name.
            adapter: a directory, a file, a state dict or a binding.
            **options: the options of ``adaptc.swap``.

        Raises:
            ConfigError: the name is taken, or the bank is full.
            CheckpointError: the adapter does not fit, or is not finite.
            SwapError: the adapter needs other sites.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {short_repr(name)}")
        if name in self._contents.adapters:
            raise _name_taken_error(name)
        binding = self._bind_adapter(name, adapter, options)
        with self._lock:
            if name in self._contents.adapters:
                raise _name_taken_error(name)
            self._contents = self._with_adapter(self._contents, name, binding)

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Replace the adapter called ``name`` by another one. After an error the bank is unchanged.

        Args:
            name: the name of the adapter.
            adapter: an adapter as :meth:`add` takes it.
            **options: the options of ``adaptc.swap``.

        Raises:
            AdaptcError: the bank does not have the name; also what :meth:`add` raises.
        """
        check_adapter_names([name], self._contents.adapters)
        binding = self._bind_adapter(name, adapter, options)
        with self._lock:
            check_adapter_names([name], self._contents.adapters)
            self._contents = self._with_adapter(self._contents, name, binding)

    def remove(self, name: str) -> None:
        """Remove an adapter; calls that have begun keep it.

        Args:
            name: the name of the adapter.

        Raises:
            AdaptcError: the bank does not have the name.
        """
        with self._lock:
            check_adapter_names([name], self._contents.adapters)
            self._contents = self._contents.without_adapters([name])

    def _with_adapter(
        self, contents: BankContents, name: str, binding: Binding, needed_names: Collection[str] = ()
    ) -> BankContents:
        """Return ``contents`` with one more adapter, and without those that the limits evict for it, never
        ``needed_names`` ones.

        Raises ConfigError where there is no room.
        """
        gone = self.limits.choose_evicted(contents.adapters, contents.use_order, name, binding, needed_names)
        return contents.with_adapter(name, binding, gone)

    def _bind_adapter(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        try:
            binding = bind_adapter(self._program, adapter, trainable=self.base_program.training, **options)
            self.limits.check_adapter(name, binding, was_read=isinstance(adapter, (str, os.PathLike, Mapping)))
        except AdaptcError as error:
            error.add_note(f"It is adapter {name!r} of the bank.")
            raise
        return binding

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Run the program. ``adapters`` has an entry for each row of the batch: a name, None for the base, or a dict of
        names and weights. A dict adds up the changes of its adapters, each times its weight.

        Raises AdaptcError for a name that the bank does not have, after the loader was asked. Raises AdaptcError where
        the batch has another number of rows than ``adapters``. In both cases nothing was computed.
        """
        return self._untraced_call(self, args, kwargs, adapters)

    def assigned(self, adapters: Any) -> ProgramSelection:
        """Return a callable that keeps this assignment and these adapters, for the calls of a generation.

        Args:
            adapters: an entry for each row, as calls take them.

        Returns:
            a callable of batches that have each row once, or each row equally many times in succession (beams).
        """
        mixes = parse_row_adapters(adapters)
        return self.make_selection(mixes, self._bindings_for_call(adapter_names_in(mixes)))

    def make_selection(self, mixes: Mixes, table: Mapping[str, Binding]) -> ProgramSelection:
        """Return a callable that keeps the selection ``mixes`` and the adapters of ``table``, which need not be in the
        bank."""
        return ProgramSelection(self._callable_or_stack(mixes, table), mixes, self, self._program, table)

    def _bindings_for_call(self, names: tuple[str, ...]) -> Mapping[str, Binding]:
        """Return the adapters that a call names, and note that they were used. The loader loads those that are missing.
        The call keeps them even if the bank drops them meanwhile.

        Raises AdaptcError for a name that neither the bank nor its loader has, ConfigError where the limits allow no
        more.
        """
        self.limits.check_call(names)
        table = self._contents.adapters
        found = {n: table[n] for n in names if n in table}
        missing = [n for n in names if n not in found]
        if missing and self.loader is None:
            check_adapter_names(missing, table)
        loaded = {n: self._load(n) for n in missing}
        with self._lock:
            held = self._contents
            for name, binding in loaded.items():
                if name not in held.adapters:  # else another thread was first
                    held = self._with_adapter(held, name, binding, names)
                found[name] = held.adapters[name]
            self._contents = held.after_use_of(names)
        return found

    def _load(self, name: str) -> Binding:
        assert self.loader is not None
        found = self.loader(name)
        if found is None:
            raise AdaptcError(f"the bank has no adapter {name!r}, and its loader gave none{did_you_mean(name, self)}")
        return self._bind_adapter(name, found, {})

    def _callable_or_stack(self, mixes: Mixes, table: Mapping[str, Binding]) -> Callable[..., Any] | AdapterStack:
        """Return what computes a selection: a callable where all rows want the base, or one adapter with weight 1;
        else a stack.

        It is a stack, too, where that callable would compile something, and for adapters that train.
        """
        names = adapter_names_in(mixes)
        if not self.base_program.attachments or not (
            names or self._would_compile(self._program.call_state.base_program)
        ):
            return self._base_callable()
        alone = bool(names) and all(mix == {names[0]: 1.0} for mix in mixes) and not self.base_program.training
        if alone and not self._would_compile(self._program):
            return self._single_callable(names[0], table)
        return self._find_stack(names, table)

    def _would_compile(self, program: Any) -> bool:
        """Return whether calls of ``program`` would compile something; None stands for a base that nobody has made
        yet."""
        if not self.code_cache.uses_compiler:
            return False
        if program is None or program.call_state.executor is None:
            return True
        return not all(code.is_compiled for code in self.executors_of(program))

    def _base_callable(self) -> Callable[..., Any]:
        base: ProgramCore = self._program.base  # type: ignore[attr-defined]
        return self._with_state(base, Binding.empty()) if self.state else base.snapshot_call()

    def _with_state(self, program: ProgramCore, binding: Binding) -> Callable[..., Any]:
        """Return a callable that runs ``program`` with ``binding`` on the buffers of the bank."""
        code = program.executor()
        arguments = code.arguments_with_state(binding, self.state)
        return lambda *args, **kwargs: code(arguments, args, kwargs)

    def _single_callable(self, name: str, table: Mapping[str, Binding]) -> Callable[..., Any]:
        return self._with_state(self._program, table[name]) if self.state else self._bound_adapter(name, table)

    def _bound_adapter(self, name: str, table: Mapping[str, Binding]) -> BoundProgram:
        found = self._contents.bound_programs.get(name)
        if found is None or found.binding is not table[name]:
            found = BoundProgram(self._program, table[name])
            with self._lock:
                self._contents = self._contents.with_bound(name, found)
        return found

    def _find_stack(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> AdapterStack:
        kept = self._contents.stacks
        found = next((s for s in reversed(kept) if not names or s.serves(names, table)), None)
        if found is None:
            members = tuple(table[n] for n in names)
            found = self._make_stack(names, members, self.code_cache.stack_capacity(len(names)))
        # A kept stack would miss the optimizer's updates of adapters that train, so their stack is made in every call.
        if not self.base_program.training:
            with self._lock:
                self._contents = self._contents.with_stack(found)
        return found

    def _make_stack(self, names: tuple[str, ...], members: tuple[Binding, ...], count: int) -> AdapterStack:
        source, like = self.base_program, members or (self._program.binding,)
        # A stack of adapters that train is not kept, and the caller's transforms and modes must see how it is made.
        with nullcontext() if source.training else outside_modes():
            return AdapterStack(
                names, members, count, stack_adapters(like, source.attachments, source.ops, count, self.kernel_sites)
            )

    def empty_stack(self, count: int) -> AdapterStack:
        """Return a stack with a capacity of ``count`` that holds no adapter of the bank, for making code."""
        return self._make_stack((), (), count)

    def executor_for(self, stack: AdapterStack, has_long_rows: bool) -> Executor:
        """Return the code of calls on ``stack``, made at the first such call. ``has_long_rows``: as for
        :meth:`BankCode.of`."""
        return self.code_cache.executor_for("", stack, has_long_rows)

    def executors_of(self, program: ProgramCore) -> list[Executor]:
        """Return the code of calls of ``program``, made now if it was not."""
        return [program.executor()]

    def warm(self, adapters: int | None = None) -> None:
        """Make now all code that calls need, so that no call waits for it. Other calls go on meanwhile.

        Args:
            adapters: the most adapters of a call. None stands for the capacity, or without one for the adapters in the
                bank, at least two.

        Raises:
            ConfigError: ``adapters`` is no number from 1 to the capacity.
        """
        warm_bank(self, adapters)

    # -- copies and exports --------------------------------------------------------------------------------------------

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """Return a plain exported program of these adapters, in which nothing of adaptc is left.

        Args:
            adapters: names, or None for all.

        Returns:
            a program with one more keyword, ``adapter_coefficients``: float32 (rows, adapters), in the order given.

        Raises:
            AdaptcError: the bank does not have a name.
            ConfigError: there is no adapter.
        """
        table = self._contents.adapters
        if isinstance(adapters, str) or not all(isinstance(n, str) for n in adapters or ()):
            raise ConfigError(f"adapters={short_repr(adapters)} must be a list of names, or None for all adapters")
        names = tuple(table) if adapters is None else tuple(adapters)
        check_adapter_names(names, table)
        if not names:
            raise ConfigError("the bank is empty, so there is nothing to export")
        made = stack_adapters(
            [table[n] for n in names], self.base_program.attachments, self.base_program.ops, len(names)
        )
        # Slots in a stack are strided views; archives want contiguous tensors.
        made = replace(made, values={f: t.detach().contiguous() for f, t in made.values.items()})
        return self.row_program.export_program(made, len(names))

    def __copy__(self) -> Bank:
        """Return a bank with the same adapters and the program's buffers; adding to one does not change the other."""
        return self._copy_with(self._program, dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """Return a bank with tensors of its own, whose buffers continue from what this bank's calls wrote."""
        made = self._copy_with(copy.deepcopy(self._program, memo), partial(copy.deepcopy, memo=memo))
        made.state = copy_sharing_memory(self.state, self.state)
        return made

    def _copy_with(self, program: ProgramCore, adapters: Callable[[dict[str, Binding]], dict[str, Binding]]) -> Bank:
        now = self._contents
        held = {n: now.adapters[n] for n in now.use_order}
        limits = {f.name: getattr(self.limits, f.name) for f in fields(self.limits)}
        return self._make_bank(program, adapters(held), loader=self.loader, probes=self._probes, **limits)

    def _make_bank(self, program: ProgramCore, adapters: Mapping[str, Any], **options: Any) -> Bank:
        return Bank(program, adapters, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a bank cannot be pickled: write its program with adaptc.save, its adapters with adaptc.save_adapter, and "
            "make another where they are read; copy.deepcopy(bank) gives one with tensors of its own"
        )


def _name_taken_error(name: str) -> ConfigError:
    return ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")


def _call(bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Any) -> Any:
    bank.row_program.check_call(len(parse_row_adapters(adapters)), args, kwargs)
    return bank.assigned(adapters).run(args, kwargs)
