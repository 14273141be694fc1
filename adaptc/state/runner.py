"""Run a program with adapters that stay, whatever the program is swapped to.

    Engine      computes a program with prepared adapters: its graph, or the compiled code of a package
    AdapterSelection   the adapters that calls use: one for all rows of a batch, or those of each row
    Runner      a callable of an engine with one selection

A program that is called as a whole is run by calling the runner. One that is called part by part, such as an encoder
and a decoder, gives a callable of each part, all with the same adapters.

Engines see a selection only through ``prepare``. A selection by token instead of by row would be another class here,
and another form that engines prepare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.hoisted_values import HoistedMemory

#: the name of the one part of a program that is called as a whole
FORWARD = "forward"


@dataclass(frozen=True)
class ProgramPart:
    """A callable of some of a program's outputs, by name, and the names of the inputs that it takes. ``binding``: the
    adapter that it keeps, None where it keeps none."""

    run: Callable[..., dict[str, Tensor]]
    inputs: Collection[str]
    binding: Any = None


@dataclass(frozen=True, eq=False)
class AdapterSelection:
    """The adapter that all rows of a batch use; None for a program without adapters."""

    binding: Any

    @property
    def has_adapter(self) -> bool:
        """Return whether there is an adapter at any site; the base has none."""
        return self.binding is not None and bool(self.binding.methods)

    def check_encoder_rows(self, rows: int) -> None:
        """Raise AdaptcError where a call may not encode so many rows. One adapter takes any number."""


class Engine(ABC):
    """Compute a program with the adapters of a selection. One engine serves any number of selections."""

    #: the form that adapters are computed in, and why
    form, why = "apply", ""

    @property
    @abstractmethod
    def program(self) -> Any:
        """Return the program, or the package, that is computed."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return the device that calls run on."""

    @abstractmethod
    def prepare(self, selection: Any) -> Any:
        """Return what calls with ``selection`` need: its adapters as the code takes them."""

    @abstractmethod
    def run(self, prepared: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call of the whole program."""

    @abstractmethod
    def parts(self, prepared: Any, outputs: Mapping[str, Sequence[str]]) -> Mapping[str, ProgramPart]:
        """Return a callable of each part. ``outputs``: part -> names of its outputs; a package knows its own."""

    @abstractmethod
    def expected_inputs(self, prepared: Any) -> Mapping[str, Any]:
        """Return the inputs that calls take: name -> tensor of the expected shape, or constant."""

    def for_one_row(self, selection: Any, name: str) -> Runner:
        """Return a runner of the program with the adapter ``name`` of a selection by row."""
        raise AdaptcError(f"this runner keeps one adapter for all rows, and has none by the name {name!r}")

    def state(self, prepared: Any) -> Mapping[str, Tensor]:
        """Return FQN -> the tensor that calls write to in place, which belongs to the runner alone."""
        return {}

    def memory(self, prepared: Any) -> HoistedMemory:
        """Return the memory that is held for the selection alone."""
        return HoistedMemory(0, 0)

    def copy(self, runner: Runner, memo: dict[int, Any] | None) -> Runner:
        """Return a copy of ``runner``, which has tensors of its own where ``memo`` is that of a deep copy."""
        raise self.pickle_error()

    @abstractmethod
    def pickle_error(self) -> AdaptcError:
        """Return the error of pickling a runner, which says what to do instead."""

    @abstractmethod
    def describe(self, runner: Runner) -> str:
        """Return the runner's ``repr``."""


class Runner:
    """A callable that keeps its adapters, made by ``bind`` of programs and packages, and by ``Bank.select``.

    It takes the inputs of its program, and returns its outputs. Any thread may call it. It runs with the options that
    the program had when it was made. Only the limit on hoisted values, :attr:`AdaptedProgram.hoist_limit`, follows the
    program.

    Example:
        >>> bound = prog.bind(lora_weights(seed=1)[1])
        >>> bound(x).shape
        torch.Size([2, 3])
    """

    def __init__(self, engine: Engine, selection: AdapterSelection, prepared: Any = None) -> None:
        self.engine, self.selection = engine, selection
        #: what the engine made of the selection
        self.prepared = engine.prepare(selection) if prepared is None else prepared
        self._untraced_call = not_traced(_call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._untraced_call(self, args, kwargs)

    def parts(self, outputs: Mapping[str, Sequence[str]]) -> Mapping[str, ProgramPart]:
        """Return a callable of each part of the program, all with this selection.

        ``outputs``: part -> names of its outputs. Raises ConfigError for a name that is not an output.
        """
        return self.engine.parts(self.prepared, outputs)

    @property
    def program(self) -> Any:
        """Return the program, or the package, that the adapters are bound to."""
        return self.engine.program

    @property
    def binding(self) -> Any:
        """Return the adapter that calls use; where each row has its own, one that tells their names alone."""
        return self.selection.binding

    @property
    def has_adapter(self) -> bool:
        """Return whether any row has an adapter; the base has none."""
        return self.selection.has_adapter

    @property
    def device(self) -> torch.device:
        """Return the device that it runs on."""
        return self.engine.device

    @property
    def form(self) -> str:
        """Return the form in which adapters are computed, "apply" or "weight"."""
        return self.engine.form

    @property
    def why(self) -> str:
        """Return the reason for the form."""
        return self.engine.why

    @property
    def expected_inputs(self) -> Mapping[str, Any]:
        """Return the inputs that calls take: name -> tensor of the expected shape, or constant."""
        return self.engine.expected_inputs(self.prepared)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return FQN -> the tensor that calls write to in place (caches and statistics), which belongs to this callable
        alone."""
        return self.engine.state(self.prepared)

    @property
    def held(self) -> HoistedMemory:
        """Return the memory that it holds: the weights of the weight form, hoisted values, an adapter in a package.

        There are no hoisted values before the first call, nor between a change of :attr:`AdaptedProgram.hoist_limit`
        and the next call.
        """
        return self.engine.memory(self.prepared)

    def snapshot_call(self) -> Runner:
        """Return the runner itself, which keeps its adapters already; programs return another one here."""
        return self

    def for_one_row(self, name: str) -> Runner:
        """Return a runner of the program with the adapter ``name`` alone, one of those that rows have here."""
        return self.engine.for_one_row(self.selection, name)

    def __copy__(self) -> Runner:
        """Return another runner on the same tensors, whose buffers begin as the program's are now."""
        return self.engine.copy(self, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        """Return a runner with tensors of its own, whose buffers continue from what this one's calls wrote."""
        return self.engine.copy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.engine.pickle_error()

    def __repr__(self) -> str:
        return self.engine.describe(self)


def _call(runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return runner.engine.run(runner.prepared, args, kwargs)


def program_of(runner: Any) -> Any:
    """Return the program, or the package, that ``runner`` is, or that it is bound to."""
    return getattr(runner, "program", runner)
