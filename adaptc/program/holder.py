"""What holds a program and does more with it than call it, such as generate text.

Before: a function of a program, and something that is one or holds one. After: the function works on the program
inside, and a program that it gives is held in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Self, TypeVar

from adaptc.program.adapted import AdaptedProgram

F = TypeVar("F", bound=Callable[..., Any])


class Holder(ABC):
    """Derive from it, and the functions of adaptc take it for the program that it holds."""

    @property
    @abstractmethod
    def program(self) -> AdaptedProgram:
        """The program inside. Raises AdaptcError where there is none that may be changed."""

    @abstractmethod
    def holding(self, program: AdaptedProgram) -> Self:
        """The same for another version of its program: merged, unloaded, lowered."""

    @abstractmethod
    def beside(self) -> dict[str, str]:
        """Texts by name that are saved in the file of its program, from which it is made again."""

    @abstractmethod
    def as_program(self, model: Any) -> AbstractContextManager[Any]:
        """A context in which ``model``, which it was made from, takes what its program takes."""


def through_holders(function: F) -> F:
    """``function``, whose first argument is a program, for holders, too."""

    @wraps(function)
    def taking(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, Holder):
            return function(program, *args, **kwargs)
        found = function(program.program, *args, **kwargs)
        return program.holding(found) if isinstance(found, AdaptedProgram) else found

    return taking  # type: ignore[return-value]
