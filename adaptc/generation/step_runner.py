"""Say what a generator asks of the object that computes its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from adaptc.state.program_parts import ProgramPart


class StepRunner(Protocol):
    """A program, a package of one, or an adapter bound to either."""

    @property
    def binding(self) -> Any:
        """Return the adapter that calls use."""
        ...

    @property
    def device(self) -> torch.device: ...

    def snapshot_call(self) -> Callable[..., Any]:
        """Return a callable that keeps the current adapter."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class PartsRunner(StepRunner, Protocol):
    """A package of a program in parts, or an adapter bound to one, or the rows of a bank on such a program."""

    def parts(self) -> Mapping[str, ProgramPart]:
        """Return the parts by name, all with the current adapter."""
        ...
