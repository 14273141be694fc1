"""Keep the adapters of a bank as bindings to a program, and stack those that a call uses.

A program that is called as a whole has one part. One that is called part by part, such as an encoder and a decoder, has
the outputs of each part. Adapters are held and stacked once for all parts; code is made for each. Every part says for
itself what its rows are: an encoder may read one row for several that are decoded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.bank import Bank
from adaptc.bank.bank_code import BankCode, find_kernel_sites
from adaptc.bank.bank_report import BankReport
from adaptc.bank.base_program import check_bank_options, take_base_program
from adaptc.bank.capacity import Limits
from adaptc.bank.compile_bank import RowProgram
from adaptc.bank.find_batch_axis import TokenInputs
from adaptc.bank.placement import BankContents, BankTable, Placement, parts_error
from adaptc.bank.row_adapters import RowSelection
from adaptc.bank.stack_adapters import AdapterStack, restack_adapter, stack_adapters
from adaptc.bank.stack_engine import StackEngine
from adaptc.bank.warm_up import warm_bank
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.runtime.executor import Executor
from adaptc.runtime.mutated_buffers import copy_sharing_memory
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import GraphEngine
from adaptc.state.program_parts import executors_of_parts
from adaptc.state.runner import FORWARD, AdapterSelection, Runner
from adaptc.torch_modes import outside_modes

#: number of stacks that are kept, for calls that use other adapters in turn
MAX_STACKS = 2


@dataclass(frozen=True, eq=False)
class StackCache:
    """The stacks that are kept, most recently used last, and the runners of single adapters, by name."""

    stacks: tuple[AdapterStack, ...] = ()
    runners: Mapping[str, Runner] = field(default_factory=dict[str, Runner])

    def without_stale(self, adapters: Mapping[str, Binding]) -> Self:
        """Return the cache without what is of adapters other than these."""
        stacks = tuple(s for s in self.stacks if all(adapters.get(n) is b for n, b in s.named_bindings))
        runners = {n: r for n, r in self.runners.items() if adapters.get(n) is r.binding}
        return replace(self, stacks=stacks, runners=runners)

    def with_stacks(self, stacks: Sequence[AdapterStack]) -> Self:
        """Return the cache with ``stacks`` as the most recently used."""
        return replace(self, stacks=(*(s for s in self.stacks if s not in stacks), *stacks)[-MAX_STACKS:])


class StackPlacement(Placement):
    """Run rows on the graph of ``program``.

    ``part_outputs``: part -> names of its outputs; None for a program that is called as a whole. ``probes`` and
    ``row_inputs``: as for :meth:`RowProgram.locate_rows`. ``state``: FQN -> the buffer that calls write to; None for a
    copy of the program's.
    """

    program: ProgramCore

    @outside_modes()
    def __init__(
        self,
        program: ProgramCore,
        limits: Limits,
        part_outputs: Mapping[str, Sequence[str]] | None = None,
        probes: Sequence[Mapping[str, Any]] = (),
        state: Mapping[str, Tensor] | None = None,
        row_inputs: TokenInputs | int = 0,
    ) -> None:
        self.limits, self.part_outputs, self._probes, self._row_inputs = limits, part_outputs, probes, row_inputs
        self.program, self.table = program.snapshot(), BankTable(StackCache())
        #: the program without adapters, and its sites
        self.base_program = base = take_base_program(self.program)
        parts = {FORWARD: base} if part_outputs is None else {n: base.take_part(o) for n, o in part_outputs.items()}
        #: part -> where the rows of the batch are in it
        self.row_programs: Mapping[str, RowProgram] = {
            n: RowProgram.locate_rows(part, probes, row_inputs) for n, part in parts.items()
        }
        #: ids of the sites that fused GPU kernels compute
        self.kernel_sites = find_kernel_sites(base, self.row_programs, self.program.options)
        self.code_cache = BankCode(self.row_programs, self.program.options, limits, base.training, self.kernel_sites)
        #: FQN -> the bank's own copy of a tensor that calls write to (a cache, a counter)
        self.state: Mapping[str, Tensor] = (
            copy_sharing_memory(base.base, base.written_tensors) if state is None else copy_sharing_memory(state, state)
        )
        #: part -> FQN -> a buffer of ``state`` that the code of the part writes to
        self.part_states: Mapping[str, Mapping[str, Tensor]] = (
            {FORWARD: self.state} if part_outputs is None else self._states_of_parts()
        )

    def _states_of_parts(self) -> dict[str, Mapping[str, Tensor]]:
        written = {name: part.written_tensors for name, part in self.row_programs.items()}
        return {name: {n: t for n, t in self.state.items() if n in names} for name, names in written.items()}

    # -- adapters ------------------------------------------------------------------------------------------------------

    def bind(self, name: str, adapter: Any, options: Mapping[str, Any]) -> Binding:
        binding = bind_adapter(self.program, adapter, trainable=self.base_program.training, **options)
        self.limits.check_adapter(name, binding, was_read=isinstance(adapter, (str, os.PathLike, Mapping)))
        return binding

    def prepare_replacement(self, name: str, binding: Binding) -> Sequence[AdapterStack]:
        base, kept, made = self.base_program, self.table.contents.placed.stacks, list[AdapterStack]()
        for stack in kept:
            if name in stack.names:
                # Sizes that cannot be brought together matter to calls that mix the adapters, if there will be any.
                with suppress(AdaptcError), outside_modes():
                    made.append(restack_adapter(stack, name, binding, base.attachments, base.ops, self.kernel_sites))
        return made

    def store(
        self,
        contents: BankContents,
        name: str,
        binding: Binding,
        needed_names: Collection[str] = (),
        prepared: Sequence[AdapterStack] = (),
    ) -> BankContents:
        gone = self.limits.choose_evicted(contents.adapters, contents.use_order, name, binding, needed_names)
        stored = contents.with_adapter(name, binding, gone)
        return stored.with_placed(stored.placed.with_stacks(prepared)) if prepared else stored

    # -- calls ---------------------------------------------------------------------------------------------------------

    def check_call(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.part_outputs is not None:
            raise parts_error()
        self.row_programs[FORWARD].check_call(count, args, kwargs)

    def select(self, selection: RowSelection) -> Runner:
        return Runner(StackEngine(self), selection)

    def runner_or_stack(self, selection: RowSelection) -> Runner | AdapterStack:
        """Return what computes a selection: a runner where all rows want the base, or one adapter with weight 1; else a
        stack.

        It is a stack, too, where that runner would compile something, and for adapters that train.
        """
        names, single = selection.names, selection.single_adapter
        if not self.base_program.attachments or not (
            names or self._would_compile(self.program.call_state.base_program)
        ):
            program: Any = self.program  # of a class above, which has a base
            base: ProgramCore = program.base
            return Runner(GraphEngine(base, self.state), AdapterSelection(Binding.empty()))
        if single is not None and not self.base_program.training and not self._would_compile(self.program):
            return self._single_runner(single, selection.adapters)
        return self._find_stack(names, selection.adapters)

    def _would_compile(self, program: Any) -> bool:
        """Return whether calls of ``program`` would compile something; None stands for a base that nobody has made
        yet."""
        if not self.code_cache.uses_compiler:
            return False
        if program is None or program.call_state.executor is None:
            return True
        return not all(code.is_compiled for code in self.executors_of(program))

    def _single_runner(self, name: str, adapters: Mapping[str, Binding]) -> Runner:
        found = self.table.contents.placed.runners.get(name)
        if found is None or found.binding is not adapters[name]:
            found = Runner(GraphEngine(self.program, self.state), AdapterSelection(adapters[name]))
            self._remember(lambda kept: replace(kept, runners={**kept.runners, name: found}))
        return found

    def _find_stack(self, names: tuple[str, ...], adapters: Mapping[str, Binding]) -> AdapterStack:
        kept = self.table.contents.placed.stacks
        found = next((s for s in reversed(kept) if not names or s.serves(names, adapters)), None)
        if found is None:
            members = tuple(adapters[n] for n in names)
            found = self._make_stack(names, members, self.code_cache.stack_capacity(len(names)))
        # A kept stack would miss the optimizer's updates of adapters that train, so their stack is made in every call.
        if not self.base_program.training and kept[-1:] != (found,):
            stack = found
            self._remember(lambda cache: cache.with_stacks([stack]))
        return found

    def _remember(self, change: Callable[[StackCache], StackCache]) -> None:
        """Change what is kept; what is of adapters that the bank no longer has is not."""
        with self.table.lock:
            now = self.table.contents
            self.table.contents = now.with_placed(change(now.placed))

    def _make_stack(self, names: tuple[str, ...], members: tuple[Binding, ...], count: int) -> AdapterStack:
        source, like = self.base_program, members or (self.program.binding,)
        # A stack of adapters that train is not kept, and the caller's transforms and modes must see how it is made.
        with nullcontext() if source.training else outside_modes():
            return AdapterStack(
                names, members, count, stack_adapters(like, source.attachments, source.ops, count, self.kernel_sites)
            )

    # -- what warming, packages and exports ask ------------------------------------------------------------------------

    def warm(self, adapters: int | None) -> None:
        warm_bank(self, adapters)

    def stack_of(self, members: Mapping[str, Binding]) -> AdapterStack:
        """Return a new stack of these adapters, which the bank does not keep."""
        names = tuple(members)
        return self._make_stack(names, tuple(members.values()), self.code_cache.stack_capacity(len(names)))

    def empty_stack(self, count: int) -> AdapterStack:
        """Return a stack with a capacity of ``count`` that holds no adapter of the bank, for making code."""
        return self._make_stack((), (), count)

    def executors_of(self, program: ProgramCore) -> list[Executor]:
        """Return the code of calls of ``program``, made now if it was not."""
        return [program.executor()] if self.part_outputs is None else executors_of_parts(program, self.part_outputs)

    def report(self, contents: BankContents) -> BankReport:
        stacks = contents.placed.stacks
        held, names = sum(s.nbytes for s in stacks), tuple(s.names for s in stacks)
        return BankReport(contents.by_last_use(), held, names, self.limits.capacity, self.limits.max_bytes)

    def export(self, adapters: Mapping[str, Binding]) -> ExportedProgram:
        base, count = self.base_program, len(adapters)
        return self.export_stack(stack_adapters([*adapters.values()], base.attachments, base.ops, count), count)

    def export_stack(self, stack: Binding, count: int) -> ExportedProgram:
        """Return a plain exported program with the tensors of ``stack``, which is of ``count`` adapters.

        Raises AdaptcError for a program that is called part by part.
        """
        if self.part_outputs is not None:
            raise AdaptcError("this bank is of a program that is called part by part, which no one exported program is")
        # Slots in a stack are strided views; archives want contiguous tensors.
        made = replace(stack, values={f: t.detach().contiguous() for f, t in stack.values.items()})
        return self.row_programs[FORWARD].export_program(made, count)

    # -- copies --------------------------------------------------------------------------------------------------------

    def copy(self, memo: dict[int, Any] | None) -> StackPlacement:
        program = self.program if memo is None else copy.deepcopy(self.program, memo)
        state = None if memo is None else self.state
        return StackPlacement(program, self.limits, self.part_outputs, self._probes, state, self._row_inputs)

    def copy_with_adapters(self, memo: dict[int, Any]) -> StackPlacement:
        """Return a deep copy with the adapters, for a selection of its own."""
        made = self.copy(memo)
        for name, binding in copy.deepcopy(self.table.contents.by_last_use(), memo).items():
            made.table.contents = made.store(made.table.contents, name, binding)
        return made

    def pickle_error(self) -> AdaptcError:
        return AdaptcError(
            "a bank cannot be pickled: write its program with adaptc.save, its adapters with adaptc.save_adapter, and "
            "make another where they are read; copy.deepcopy(bank) gives one with tensors of its own"
        )


def make_bank(
    program: ProgramCore,
    adapters: Mapping[str, Any] | None = None,
    *,
    capacity: int | None = None,
    max_rank: int | None = None,
    max_bytes: int | None = None,
    evict: bool = False,
    loader: Callable[[str], Any] | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
    part_outputs: Mapping[str, Sequence[str]] | None = None,
    axis: int = 0,
    row_inputs: TokenInputs | None = None,
    **options: Any,
) -> Bank:
    """Return a bank of ``program``, with the limits and options of ``AdaptedProgram.bank``.

    ``probes``, ``part_outputs`` and ``row_inputs`` are as for :class:`StackPlacement`. Raises ConfigError for an
    unknown option.
    """
    limits = {"capacity": capacity, "max_rank": max_rank, "max_bytes": max_bytes, "evict": evict, "axis": axis}
    check_bank_options(options)
    return Bank(make_placement(program, limits, part_outputs, probes, row_inputs), adapters, loader, **options)


def make_placement(
    program: ProgramCore,
    limits: dict[str, Any],
    part_outputs: Mapping[str, Sequence[str]] | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
    row_inputs: TokenInputs | None = None,
) -> StackPlacement:
    """Return a placement for a bank of ``program``, and take its limits and its axis out of ``limits``.

    Raises ConfigError for an axis that is none.
    """
    axis: Any = limits.pop("axis", 0)  # callers may give anything
    if not isinstance(axis, int) or isinstance(axis, bool) or axis < 0:
        raise ConfigError(f"axis={short_repr(axis)} must be the number of an axis, from 0 upwards")
    found = Limits(**{f.name: limits.pop(f.name) for f in fields(Limits) if f.name in limits})
    return StackPlacement(program, found, part_outputs, probes, row_inputs=row_inputs or axis)
