"""What holds a program and does more with it than call it, such as generate text.

Before: a function of a program, and something that is one or holds one. After: the function works on the program
inside, and a program that it gives is held in the same way.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from typing import Any, Self, TypeVar

from adaptc.errors import AdaptcError
from adaptc.program.adapted import AdaptedProgram
from adaptc.program.model_directory import write_model_of

F = TypeVar("F", bound=Callable[..., Any])


class Holder(ABC):
    """Derive from it, and the functions of adaptc take it for the program that it holds."""

    @property
    @abstractmethod
    def program(self) -> Any:
        """The program inside, or the package of one. Raises AdaptcError where there is none that may be changed."""

    @property
    @abstractmethod
    def runs(self) -> Any:
        """What it calls: the program inside, or what is bound to it."""

    @property
    def binding(self) -> Any:
        """The adapter that it calls it with."""
        return self.runs.binding

    @abstractmethod
    def holding(self, program: AdaptedProgram) -> Self:
        """The same for another version of its program: merged, unloaded, lowered."""

    @abstractmethod
    def beside(self) -> dict[str, str]:
        """Texts by name that are saved in the file of its program, from which it is made again."""

    @abstractmethod
    def carried(self, tokenizer: Any) -> dict[str, bytes]:
        """Files by path that are carried in a package of its program, from which it is made again. Raises ConfigError
        for a tokenizer that does not fit, and where it cannot be packaged."""

    @abstractmethod
    def drawn(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` of verify with inputs, for a package of its program, which says too little of them."""

    @abstractmethod
    def divided(self) -> Mapping[str, Sequence[str]] | None:
        """Part -> its outputs, of a program whose parts are called one at a time, also in a package."""

    @abstractmethod
    def notes(self) -> Sequence[str]:
        """Lines of a report: what it does with its program."""

    @abstractmethod
    def as_program(self, model: Any) -> AbstractContextManager[Any]:
        """A context in which ``model``, which it was made from, takes what its program takes."""

    def twin(self) -> Self:
        """Another object of the same, for what a call notes on it."""
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

    def set_scale(self, scale: float, adapter: str | None = None, modules: str | Iterable[str] | None = None) -> None:
        """As :meth:`AdaptedProgram.set_scale`."""
        self.program.set_scale(scale, adapter, modules)

    def set_active(self, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
        """As :meth:`AdaptedProgram.set_active`."""
        self._inside("set_active").set_active(adapters)

    @property
    def active_adapters(self) -> list[str]:
        """As :attr:`AdaptedProgram.active_adapters`."""
        return self._inside("active_adapters").active_adapters

    @property
    def available_adapters(self) -> list[str]:
        """As :attr:`AdaptedProgram.available_adapters`."""
        return self._inside("available_adapters").available_adapters

    def disabled(self) -> AbstractContextManager[None]:
        """As :meth:`AdaptedProgram.disabled`."""
        return self._inside("disabled").disabled()

    def rescaled(self, multiplier: float) -> AbstractContextManager[None]:
        """As :meth:`AdaptedProgram.rescaled`."""
        return self._inside("rescaled").rescaled(multiplier)

    def delete_adapter(self, name: str) -> None:
        """As :meth:`AdaptedProgram.delete_adapter`."""
        self._inside("delete_adapter").delete_adapter(name)

    def add_adapter(self, name: str, adapter: Any, *, recompile: bool = False) -> Self:
        """As :meth:`AdaptedProgram.add_adapter`."""
        inside = self._inside("add_adapter")
        new = inside.add_adapter(name, adapter, recompile=recompile)
        return self if new is inside else self.holding(new)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the model of a program that was merged or unloaded as a transformers directory. ``options`` and errors
        as for ``adaptc.merge(program).module().save_pretrained``, AdaptcError where there is an adapter."""
        write_model_of(self._inside("save_pretrained"), save_directory, **options)

    def _inside(self, name: str) -> Any:
        """The program, for what a package has not."""
        check_program(self.program, name)
        return self.program


def inside(value: Any) -> Any:
    """What a holder calls; anything else as it is."""
    return value.runs if isinstance(value, Holder) else value


def of_programs(function: F) -> F:
    """:func:`through_holders` for a function that needs the graph, which packages have not: raises AdaptcError."""

    @wraps(function)
    def taking(program: Any, *args: Any, **kwargs: Any) -> Any:
        check_program(program.program if isinstance(program, Holder) else program, function.__name__)
        return function(program, *args, **kwargs)

    return through_holders(taking)  # type: ignore[return-value]


def check_program(program: Any, name: str, *others: type) -> None:
    """Raises AdaptcError for what is no program, nor one of ``others``, in the name of a function."""
    if not isinstance(program, (AdaptedProgram, *others)):
        raise AdaptcError(
            f"{name} takes what adaptc.compile or adaptc.load gives, not a {type(program).__name__}; of a package or "
            "a bank take the program that it was made from"
        )


def through_holders(function: F) -> F:
    """``function``, whose first argument is a program, for holders, too."""

    @wraps(function)
    def taking(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, Holder):
            return function(program, *args, **kwargs)
        found = function(program.program, *args, **kwargs)
        return program.holding(found) if isinstance(found, AdaptedProgram) else found

    return taking  # type: ignore[return-value]


def noted(function: F) -> F:
    """``function``, which gives a report of a program, for holders, too: with their notes."""

    @wraps(function)
    def taking(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, Holder):
            return function(program, *args, **kwargs)
        return replace(function(program.program, *args, **kwargs), notes=tuple(program.notes()))

    return taking  # type: ignore[return-value]
