"""Run the graph of a program with bound adapters, and buffers that belong to what is bound.

:func:`bind_program` binds one adapter. :func:`snapshot_runner` keeps the adapter that a program has now, for calls that
belong together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.hoisted_values import HoistedMemory
from adaptc.runtime.mutated_buffers import copy_sharing_memory
from adaptc.runtime.options import RunOptions
from adaptc.state.bind_forms import choose_form, make_own_weights
from adaptc.state.core import ProgramCore
from adaptc.state.program_parts import pin_parts
from adaptc.state.runner import AdapterSelection, Engine, ProgramPart, Runner
from adaptc.tables import format_bytes


class GraphEngine(Engine):
    """Run a program's graph.

    ``state``: FQN -> the buffer that calls write to in place of the program's; empty to share the program's buffers.
    ``form`` and ``why``: the form of the adapter and its reason. ``own``: for the weight form the base's program on the
    adapter's weights, and these weights.
    """

    def __init__(
        self,
        program: ProgramCore,
        state: Mapping[str, Tensor],
        form: str = "apply",
        why: str = "asked for",
        own: tuple[ProgramCore, tuple[Tensor, ...]] | None = None,
    ) -> None:
        self._program, self._state, self.form, self.why = program, state, form, why
        self._own = own

    @property
    def program(self) -> ProgramCore:
        return self._program

    @property
    def device(self) -> torch.device:
        return self._program.device

    def prepare(self, selection: AdapterSelection) -> PreparedBinding:
        if self._own is None:
            return PreparedBinding(self._program, selection.binding, self._state)
        prepared = PreparedBinding(self._own[0], self._own[0].current or Binding.empty(), self._state, True)
        self._program.run_state.add_bound(prepared)
        return prepared

    def run(self, prepared: PreparedBinding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = prepared.compiled_state()
        return now.executor(now.arguments, args, kwargs)  # type: ignore[misc]

    def parts(self, prepared: PreparedBinding, outputs: Mapping[str, Sequence[str]]) -> Mapping[str, ProgramPart]:
        return pin_parts(*prepared.executor_and_state(), outputs)

    def expected_inputs(self, prepared: PreparedBinding) -> Mapping[str, Any]:
        executor = prepared.compiled_state().executor
        return {} if executor is None else dict(executor.inputs.expected)

    def state(self, prepared: PreparedBinding) -> Mapping[str, Tensor]:
        return self._state

    @property
    def own_weights(self) -> tuple[Tensor, ...]:
        """Return the weights of the weight form; none in the apply form."""
        return () if self._own is None else self._own[1]

    def memory(self, prepared: PreparedBinding) -> HoistedMemory:
        own = self.own_weights
        return HoistedMemory(len(own), sum(t.nbytes for t in own)) + prepared.hoisted_memory

    def copy(self, runner: Runner, memo: dict[int, Any] | None) -> Runner:
        binding: Any = runner.binding
        adapter = binding if binding.methods or binding.values else None
        if memo is None:
            return bind_program(self._program, adapter, self.form)
        program = copy.deepcopy(self._program, memo)
        return bind_program(program, copy.deepcopy(adapter, memo), self.form, state=self._state)

    def pickle_error(self) -> AdaptcError:
        return AdaptcError(
            "what is bound to a program cannot be pickled: write the program with adaptc.save and the adapter with "
            "adaptc.save_adapter, and bind it again where they are read"
        )

    def describe(self, runner: Runner) -> str:
        memory = f", {format_bytes(runner.held.nbytes)} of weights" if self._own is not None else ""
        binding = runner.binding
        return f"Runner({binding.source!r}, {len(binding.methods)} sites, {self.form} form{memory})"


@dataclass(frozen=True, eq=False)
class _CallState:
    """The options, code and arguments that calls read, replaced as a whole; code and arguments are None until they are
    made."""

    options: RunOptions
    executor: Executor | None = None
    arguments: Arguments | None = None


class PreparedBinding:
    """A binding as the code of ``program`` takes it, with the buffers ``state`` that calls write to.

    The code has the options that the program had when it was made, but follows its limit on hoisted values.
    ``owns_program``: nothing else runs the program, so its limit is set with this one.
    """

    def __init__(
        self, program: ProgramCore, binding: Binding, state: Mapping[str, Tensor], owns_program: bool = False
    ) -> None:
        ready = program.compiled_state()
        assert ready.executor is not None
        self._program, self._binding, self._state, self._owns_program = program, binding, state, owns_program
        self._now = _CallState(ready.options, ready.executor, self._make_arguments(ready.executor))
        program.run_state.add_bound(self)

    def compiled_state(self) -> _CallState:
        """Return what calls read, with their code, which is made now if it was not."""
        while True:
            now = self._now
            if now.arguments is not None:
                return now
            executor = self._find_executor(now.options)
            made = _CallState(now.options, executor, self._make_arguments(executor))
            with self._program.swap_lock():
                if self._now.options is now.options:
                    self._now = made
                    return made

    def executor_and_state(self) -> tuple[ProgramCore, Executor, Binding, Mapping[str, Tensor]]:
        """Return what calls run: the program, its code, the binding, and the buffers in place of the program's."""
        now = self.compiled_state()
        assert now.executor is not None
        return self._program, now.executor, self._binding, self._state

    def _find_executor(self, options: RunOptions) -> Executor:
        if options == self._program.options:
            return self._program.executor()
        twin = self._program.with_options(**vars(options))
        return self._program.run_state.shared_executor(options, twin.executor)

    def _make_arguments(self, executor: Executor | None) -> Arguments | None:
        return None if executor is None else executor.arguments_with_state(self._binding, self._state)

    def set_hoist_limit(self, nbytes: int | None) -> None:
        """Set the limit, in bytes, on the hoisted values; a new limit frees those that are held. Called by its
        program."""
        if nbytes != self._now.options.hoist_limit:
            self._now = _CallState(replace(self._now.options, hoist_limit=nbytes))
            if self._owns_program:
                self._program.set_options(hoist_limit=nbytes)  # its code holds hoisted values, too

    @property
    def hoisted_memory(self) -> HoistedMemory:
        """Return the memory of the hoisted values."""
        arguments = self._now.arguments
        return HoistedMemory() if arguments is None else arguments.hoisted_memory


class SnapshotBinding(PreparedBinding):
    """The binding that a program had at one moment, on the program's own code and buffers; nothing changes it."""

    def __init__(self, program: ProgramCore) -> None:
        ready = program.compiled_state_of_call()
        self._program, self._binding, self._state = program, ready.binding or Binding.empty(), {}
        self._now = _CallState(ready.options, ready.executor, ready.arguments)
        self.binding = ready.binding


def snapshot_runner(program: ProgramCore) -> Runner:
    """Return a runner that keeps the current binding of ``program``, on its code and the buffers that calls write to.

    Making it does not look at the graph. It keeps the scales of a block of ``program.scaled`` that the caller is in.
    """
    prepared = SnapshotBinding(program)
    return Runner(GraphEngine(program, {}), AdapterSelection(prepared.binding), prepared)


def bind_program(
    program: ProgramCore,
    adapter: Binding | None,
    form: str = "apply",
    memory_limit: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Runner:
    """Return a runner of ``program`` with ``adapter``, in the form that ``bind_forms`` chooses; None for the base.

    Its buffers begin as the program's are now, or as a copy of ``state``.
    """
    binding = adapter or replace(Binding.empty(), source="the base")
    form, why = choose_form(program, binding, form, memory_limit)
    own = make_own_weights(program, binding) if form == "weight" else None
    runs, with_state = (program, binding) if own is None else (own[0], own[0].current or Binding.empty())
    own_state = runs.executor().copy_written_tensors(with_state) if state is None else copy_sharing_memory(state, state)
    return Runner(GraphEngine(program, own_state, form, why, own), AdapterSelection(binding))


def graph_runner(value: Any) -> Runner | None:
    """Return ``value`` where it is an adapter bound to the graph of a program; None for anything else."""
    return value if isinstance(value, Runner) and isinstance(value.engine, GraphEngine) else None
