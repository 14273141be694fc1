"""Serve batches whose rows each use an adapter of their own, none, or a weighted mix.

A bank has adapters by name, and a placement that runs them. Each row of a call gets what the program with that row's
adapters alone would compute. A new adapter, a new rank or another selection for rows compiles nothing.

There are two placements. ``StackPlacement`` runs a program's graph on stacks of the adapters in use. In a package,
``PackagePlacement`` writes each adapter to an index of the compiled code.

A call reads one frozen ``BankContents``, which is replaced as a whole, so it keeps the adapters that it began with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.bank_report import BankReport
from adaptc.bank.placement import Placement
from adaptc.bank.row_adapters import (
    Mixes,
    RowSelection,
    adapter_names_in,
    check_adapter_names,
    parse_row_adapters,
    parse_segments,
)
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, did_you_mean, listing, short_repr
from adaptc.public_names import warn_renamed
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.state.runner import Runner
from adaptc.tables import format_bytes
from adaptc.torch_modes import outside_modes


class Bank:
    """Adapters by name for the rows of batches, made by ``AdaptedProgram.bank`` and ``Generator.bank``.

    ``adaptc.load_package`` makes one from the package of a bank. Iterating yields the names, least recently used first.

    Example:
        >>> bank = prog.bank({"fr": lora_weights(seed=0)[1], "de": lora_weights(seed=1)[1]})
        >>> bank(x, adapters=["fr", {"de": 0.7, "fr": 0.3}]).shape
        torch.Size([2, 3])
    """

    @outside_modes()
    def __init__(
        self,
        placement: Placement,
        adapters: Mapping[str, Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        **options: Any,
    ) -> None:
        if loader is not None and not callable(loader):
            raise ConfigError(f"loader={short_repr(loader)} must be a function of a name that gives an adapter")
        given: Any = adapters or {}  # callers may give anything
        if not isinstance(given, Mapping):
            raise ConfigError(f"adapters={short_repr(adapters)} must be a dict of adapters by name")
        self.placement, self.loader = placement, loader
        #: the generator whose prompts are the rows; None for a program that generates nothing
        self.generator: Any = None
        self._table = placement.table
        self._untraced_call = not_traced(_call)
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter, **options)

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
        self._check_name(name)
        self._store_new(name, self._bind(name, adapter, options))

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        """Replace the adapter called ``name`` by another one. After an error the bank is unchanged.

        In a package the new adapter goes to a free index where there is one, so calls that have begun keep the old one.
        Without a free index it is written over the old one, unless a generation keeps that.

        Args:
            name: the name of the adapter.
            adapter: an adapter as :meth:`add` takes it.
            **options: the options of ``adaptc.swap``.

        Raises:
            AdaptcError: the bank does not have the name; also what :meth:`add` raises.
        """
        check_adapter_names([name], self.adapters)
        binding = self._bind(name, adapter, options)
        prepared = self.placement.prepare_replacement(name, binding)
        with self._table.lock:
            check_adapter_names([name], self.adapters)
            self._table.contents = self.placement.store(self._table.contents, name, binding, prepared=prepared)

    def remove(self, name: str) -> None:
        """Remove an adapter; calls that have begun keep it.

        Args:
            name: the name of the adapter.

        Raises:
            AdaptcError: the bank does not have the name.
        """
        with self._table.lock:
            check_adapter_names([name], self.adapters)
            self._table.contents = self._table.contents.without_adapters([name])

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is a string, not {short_repr(name)}")
        self._check_free(name)

    def _store_new(self, name: str, binding: Binding) -> None:
        with self._table.lock:
            self._check_free(name)
            self._table.contents = self.placement.store(self._table.contents, name, binding)

    def _check_free(self, name: str) -> None:
        if name in self.adapters:
            raise ConfigError(f"the bank has an adapter {name!r}: bank.replace puts another in its place")

    def _bind(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        try:
            return self.placement.bind(name, adapter, options)
        except AdaptcError as error:
            error.add_note(f"It is adapter {name!r} of the bank.")
            raise

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = ..., cu_seq_lens: Any = None, **kwargs: Any) -> Any:
        """Run the program. ``adapters`` has an entry for each row of the batch: a name, None for the base, or a dict of
        names and weights. A dict adds up the changes of its adapters, each times its weight.

        With ``cu_seq_lens`` (entries + 1,) entry i is of the rows from ``cu_seq_lens[i]`` to ``cu_seq_lens[i + 1]``.

        Raises AdaptcError for a name that the bank does not have, after the loader was asked. Raises AdaptcError where
        the batch has another number of rows than ``adapters``. In both cases nothing was computed.
        """
        return self._untraced_call(self, args, kwargs, adapters, cu_seq_lens)

    def select(self, adapters: Any, cu_seq_lens: Any = None) -> Any:
        """Return a callable that keeps this selection and these adapters, for calls that belong together.

        In a package nothing else is written to the indices of these adapters while the callable exists.

        Args:
            adapters: an entry for each row, as calls take them.
            cu_seq_lens: where the rows of each entry begin and end, as calls take it; None for one row each.

        Returns:
            a :class:`Runner` of batches that have each row once, or each row equally many times in succession (beams).
            The bank of a generator gives a generator over it.

        Raises:
            AdaptcError: the bank does not have a name.
        """
        mixes = parse_row_adapters(adapters)
        if self.generator is not None and cu_seq_lens is not None:
            raise AdaptcError("cu_seq_lens= is for rows of one call, and prompts of a generation have one entry each")
        made = self.select_rows(mixes, lengths=parse_segments(cu_seq_lens, len(mixes)))
        return made if self.generator is None else self.generator.with_runner(made)

    def select_rows(self, mixes: Mixes, repeats: bool = True, lengths: tuple[int, ...] | None = None) -> Runner:
        """Return a runner for rows with these ``mixes``. ``repeats`` and ``lengths``: as for :class:`RowSelection`."""
        adapters = self.adapters_for_call(adapter_names_in(mixes))
        return self.placement.select(RowSelection.of_mixes(mixes, adapters, repeats, lengths))

    def snapshot_call(self) -> Runner:
        """Raise AdaptcError: calls say which adapters each row has, where programs return the current one."""
        return self.select_rows(parse_row_adapters(...))

    def assigned(self, adapters: Any) -> Any:
        """Return what :meth:`select` returns; it is called so now."""
        warn_renamed("Bank.assigned", "Bank.select")
        return self.select(adapters)

    def adapters_for_call(self, names: tuple[str, ...]) -> Mapping[str, Binding]:
        """Return the adapters that a call or a request names, and note that they were used. The loader loads those that
        are missing. The caller keeps them even if the bank drops them meanwhile.

        Raises AdaptcError for a name that neither the bank nor its loader has, ConfigError where the limits allow no
        more.
        """
        self.placement.limits.check_call(names)
        present = self.adapters
        found = {n: present[n] for n in names if n in present}
        missing = [n for n in names if n not in found]
        if missing and self.loader is None:
            check_adapter_names(missing, present)
        loaded = {n: self._load(n) for n in missing}
        with self._table.lock:
            now = self._table.contents
            for name, binding in loaded.items():
                if name not in now.adapters:  # else another thread was first
                    now = self.placement.store(now, name, binding, names)
                found[name] = now.adapters[name]
            self._table.contents = now.after_use_of(names)
        return found

    def _load(self, name: str) -> Binding:
        assert self.loader is not None
        found = self.loader(name)
        if found is None:
            raise AdaptcError(f"the bank has no adapter {name!r}, and its loader gave none{did_you_mean(name, self)}")
        return self._bind(name, found, {})

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *, adapters: Any = ..., **kwargs: Any
    ) -> Any:
        """Generate with adapters of its own for each prompt. Each gets the tokens that it would get alone.

        Args:
            inputs: the prompts, as for :meth:`Generator.generate`.
            generation_config: transformers' options.
            adapters: an entry for each prompt, as calls take them. All beams and samples of a prompt keep it.
            **kwargs: further arguments of :meth:`Generator.generate`.

        Returns:
            what :meth:`Generator.generate` returns.

        Raises:
            AdaptcError: there are not as many entries as prompts, or the bank is of a program that generates nothing.
        """
        return self._require_generator().generate(inputs, generation_config, adapters=adapters, **kwargs)

    def prefill(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> Any:
        """Return the cache of a batch of prompts, each read with adapters of its own.

        Args:
            *args: the prompts, as for :meth:`Generator.prefill`.
            adapters: an entry for each prompt, as calls take them.
            **kwargs: further arguments of :meth:`Generator.prefill`.

        Returns:
            the cache.

        Raises:
            AdaptcError: there are not as many entries as prompts, or the bank is of a program that generates nothing.
        """
        return self._require_generator().prefill(*args, adapters=adapters, **kwargs)

    def _require_generator(self) -> Any:
        if self.generator is None:
            raise AdaptcError(
                "this bank is of a program that does not generate: make it of what adaptc.compile_for_generation "
                "gives, with gen.bank({...})"
            )
        return self.generator

    def warm(self, adapters: int | None = None) -> None:
        """Make now all code that calls need, so that no call waits for it. Other calls go on meanwhile.

        A package has all its code already. Adapters that leave sites out have graphs without these from now on if the
        bank has them now: warm it again after adding others.

        Args:
            adapters: the most adapters of a call. None stands for the capacity, or without one for the adapters in the
                bank, at least two.

        Raises:
            ConfigError: ``adapters`` is no number from 1 to the capacity.
        """
        self.placement.warm(adapters)

    # -- what it holds -------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.contents.use_order)

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, name: str) -> Binding:
        """Return the adapter called ``name``, bound to the program. Raises KeyError where there is none."""
        held = self.adapters
        given: Any = name  # callers may give anything
        if not isinstance(given, str) or given not in held:
            raise KeyError(f"the bank has no adapter {short_repr(name)}{did_you_mean(str(name), held)}")
        return held[name]

    @property
    def adapters(self) -> Mapping[str, Binding]:
        """Return the present adapters by name."""
        return self._table.contents.adapters

    @property
    def binding(self) -> Binding:
        """Raise AdaptcError: rows have adapters, where programs and runners have one."""
        raise AdaptcError("a bank has an adapter for each row, and none of its own: bank[name] is one of its adapters")

    @property
    def capacity(self) -> int | None:
        """Return how many adapters the bank may hold; None for any number."""
        return self.placement.limits.capacity

    @property
    def max_rank(self) -> int | None:
        """Return the largest rank; None for any. In a package each site has its own, see :attr:`ranks`."""
        return self.placement.limits.max_rank

    @property
    def ranks(self) -> dict[str, int]:
        """Return, of a package, the largest rank at each site with a rank, by the FQN of its parameter; else {}."""
        return getattr(self.program, "ranks", {})

    @property
    def path(self) -> Path | None:
        """Return the file of a package; None for a bank in memory."""
        return getattr(self.program, "path", None)

    @property
    def program(self) -> Any:
        """Return the program as it was when the bank was made, or the package."""
        return self.placement.program

    @property
    def device(self) -> torch.device:
        """Return the device that calls run on."""
        return self.program.device

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package of a generator's bank; None where there is none."""
        return None if self.generator is None else self.generator.tokenizer

    @property
    def nbytes(self) -> int:
        """Return the bytes of all adapters; tensors that several share count once."""
        return self.report().nbytes

    @property
    def held(self) -> int:
        """Return the bytes of the stacks of adapters that the bank keeps for its next calls."""
        return self.report().stack_bytes

    def report(self) -> BankReport:
        """Return a table of the adapters with their sites, ranks and bytes, and the stacks that the bank keeps.

        Returns:
            the report, which prints as a table.
        """
        return self.placement.report(self._table.contents)

    # -- copies and exports --------------------------------------------------------------------------------------------

    def exported(self, adapters: list[str] | None = None) -> ExportedProgram:
        """Return a plain exported program of these adapters, in which nothing of adaptc is left.

        Args:
            adapters: names, or None for all.

        Returns:
            a program with one more keyword, ``adapter_coefficients``: float32 (rows, adapters), in the order given.

        Raises:
            AdaptcError: the bank does not have a name, or its program is a package or is called part by part.
            ConfigError: there is no adapter.
        """
        table = self.adapters
        given: Any = adapters  # callers may give anything
        if isinstance(given, str) or not all(isinstance(n, str) for n in given or ()):
            raise ConfigError(f"adapters={short_repr(adapters)} must be a list of names, or None for all adapters")
        names = tuple(table) if adapters is None else tuple(adapters)
        check_adapter_names(names, table)
        if not names:
            raise ConfigError("the bank is empty, so there is nothing to export")
        return self.placement.export({n: table[n] for n in names})

    def __copy__(self) -> Bank:
        """Return a bank with the same adapters and the program's buffers; adding to one does not change the other."""
        made = Bank(self.placement.copy(None), self._table.contents.by_last_use(), self.loader)
        return made.attach_generator(self.generator)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """Return a bank with tensors of its own, whose buffers continue from what this bank's calls wrote."""
        adapters = copy.deepcopy(self._table.contents.by_last_use(), memo)
        return Bank(self.placement.copy(memo), adapters, self.loader).attach_generator(self.generator)

    def attach_generator(self, generator: Any) -> Bank:
        """Return this bank, whose rows are the prompts of a generator like ``generator`` from now on; None for none."""
        self.generator = None if generator is None else generator.with_runner(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.placement.pickle_error()

    def __repr__(self) -> str:
        limits = f" of {self.capacity}" if self.capacity else ""
        names = f": {listing(map(repr, self.adapters))}" if len(self) else ""
        return f"<Bank: {len(self)}{limits} adapters, {format_bytes(self.nbytes)}{names}>"


def _call(bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Any, cu_seq_lens: Any) -> Any:
    mixes = parse_row_adapters(adapters)
    lengths = parse_segments(cu_seq_lens, len(mixes))
    bank.placement.check_call(len(mixes) if lengths is None else sum(lengths), args, kwargs)
    if bank.generator is not None:
        raise AdaptcError(
            "this bank is of a program that generates: call bank.generate, or bank.select(adapters), which computes "
            "single steps"
        )
    runner = bank.select_rows(mixes, repeats=False, lengths=lengths)
    return runner.engine.run(runner.prepared, args, kwargs)
