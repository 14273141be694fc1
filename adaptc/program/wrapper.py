"""Let the functions of adaptc take objects that hold a program and do more with it than call it, such as generate text.

A function that gets such an object works on the program inside. A program that it returns is held in the same way.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, Self, TypeVar

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.errors import AdaptcError
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.program_scale import AdapterScales
from adaptc.program.swap_report import SwapReport
from adaptc.state.model_directory import write_program_model

F = TypeVar("F", bound=Callable[..., Any])


class ProgramWrapper(AdapterScales):
    """An object that holds a program; the functions of adaptc take a derived class for the program inside."""

    @property
    @abstractmethod
    def program(self) -> Any:
        """Return the program inside, or the package of one. Raises AdaptcError where there is none that may be
        changed."""

    @property
    @abstractmethod
    def runner(self) -> Any:
        """Return what calls run: the program inside, or what is bound to it."""

    @property
    def binding(self) -> Any:
        """Return the adapter that calls use."""
        return self.runner.binding

    @abstractmethod
    def with_program(self, program: AdaptedProgram) -> Self:
        """Return a wrapper like this one of another version of its program: merged, unloaded, lowered."""

    @abstractmethod
    def sidecar_texts(self) -> dict[str, str]:
        """Return name -> text that is saved in the file of the program, from which the wrapper is made again."""

    @abstractmethod
    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        """Return path -> file that goes into a package of the program, from which the wrapper is made again.

        Raises ConfigError for a tokenizer that does not fit, and where the wrapper cannot be packaged.
        """

    #: whether random inputs of the program would not fit each other, so that :meth:`example_inputs` must give them
    draws_own_inputs: ClassVar[bool] = False

    @abstractmethod
    def example_inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``options`` of verify with inputs added, for a package, which says too little of its inputs to draw
        them, and where :attr:`draws_own_inputs` is set."""

    @abstractmethod
    def part_outputs(self) -> Mapping[str, Sequence[str]] | None:
        """Return part -> names of its outputs, for a program whose parts are called one at a time, in a package too.

        None for a program that is called as a whole.
        """

    @abstractmethod
    def notes(self) -> Sequence[str]:
        """Return lines of a report that say what the wrapper does with its program."""

    @abstractmethod
    def as_program(self, model: Any) -> AbstractContextManager[Any]:
        """Run the block with ``model``, which the wrapper was made from, changed to take what the program takes."""

    def shallow_copy(self) -> Self:
        """Return another object with the same attributes, for what one call notes on it."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    @abstractmethod
    def __copy__(self) -> Self: ...

    @abstractmethod
    def __deepcopy__(self, memo: dict[int, Any]) -> Self: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"a {type(self).__name__} cannot be pickled: write what was compiled with adaptc.save(..., 'name.pt2'), "
            "and its adapters with adaptc.save_adapter, and read them where they are needed; copy.deepcopy gives one "
            "with tensors of its own"
        )

    # -- adapters are those of the program inside ---------------------------------------------------------------------

    @property
    def adapters(self) -> StoredAdapters:
        """Return the adapters of the file that the program inside was loaded from, by name."""
        return self.program.adapters

    def swap(self, adapter: Any, **options: Any) -> SwapReport:
        """Make ``adapter`` the current one of the program inside, as ``adaptc.swap`` does."""
        return self.program.swap(adapter, **options)

    # -- scales are those of the program inside ------------------------------------------------------------------------

    def update_binding(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        self.program.update_binding(change)

    def turn_off_adapter(self, spec: BindingSpec, adapter: Binding) -> Binding:
        return self.program.turn_off_adapter(spec, adapter)

    def disabled(self) -> AbstractContextManager[None]:
        return self.program.disabled()

    def scaled(self, scale: float | Mapping[str, float | None]) -> AbstractContextManager[None]:
        return self.program.scaled(scale)

    # -- what a package cannot do --------------------------------------------------------------------------------------

    def delete_adapter(self, name: str) -> None:
        """Delete one of several adapters; see :meth:`AdaptedProgram.delete_adapter`."""
        self._require_program("delete_adapter").delete_adapter(name)

    def add_adapter(self, name: str, adapter: Any, *, recompile: bool = False) -> Self:
        """Return a wrapper of the program with one more adapter, which may be this one; see
        :meth:`AdaptedProgram.add_adapter`."""
        inside = self._require_program("add_adapter")
        new = inside.add_adapter(name, adapter, recompile=recompile)
        return self if new is inside else self.with_program(new)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the model of a program that was merged or unloaded as a transformers directory.

        ``options`` and errors: as for ``adaptc.merge(program).module().save_pretrained``. Raises AdaptcError where the
        program has an adapter.
        """
        write_program_model(self._require_program("save_pretrained"), save_directory, **options)

    def _require_program(self, name: str) -> Any:
        """Return the program inside. Raises AdaptcError, in the name of ``name``, where it is a package, which cannot
        do this."""
        check_program(self.program, name)
        return self.program


def unwrap(value: Any) -> Any:
    """Return what a wrapper calls; any other ``value`` is returned as it is."""
    return value.runner if isinstance(value, ProgramWrapper) else value


def needs_graph(function: F) -> F:
    """Wrap ``function``, which needs the graph of a program, to take wrappers too (see :func:`accepts_wrappers`).

    The result raises AdaptcError for a package, which has no graph.
    """

    @wraps(function)
    def wrapper(program: Any, *args: Any, **kwargs: Any) -> Any:
        check_program(program.program if isinstance(program, ProgramWrapper) else program, function.__name__)
        return function(program, *args, **kwargs)

    return accepts_wrappers(wrapper)  # type: ignore[return-value]


def check_program(program: Any, name: str, *other_types: type) -> None:
    """Raise AdaptcError, in the name of the function ``name``, for what is neither a program nor one of
    ``other_types``."""
    if not isinstance(program, (AdaptedProgram, *other_types)):
        raise AdaptcError(
            f"{name} takes what adaptc.compile or adaptc.load gives, not a {type(program).__name__}; of a package or "
            "a bank take the program that it was made from"
        )


def accepts_wrappers(function: F) -> F:
    """Wrap ``function``, whose first argument is a program, to take wrappers too.

    It works on the program inside, and a program that it returns is held in the same way.
    """

    @wraps(function)
    def wrapper(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, ProgramWrapper):
            return function(program, *args, **kwargs)
        found = function(program.program, *args, **kwargs)
        return program.with_program(found) if isinstance(found, AdaptedProgram) else found

    return wrapper  # type: ignore[return-value]


def adds_notes(function: F) -> F:
    """Wrap ``function``, which returns a report of a program, to take wrappers too and add their notes to it."""

    @wraps(function)
    def wrapper(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, ProgramWrapper):
            return function(program, *args, **kwargs)
        return replace(function(program.program, *args, **kwargs), notes=tuple(program.notes()))

    return wrapper  # type: ignore[return-value]
