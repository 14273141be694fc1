"""Say what a generator asks of the object that computes its steps."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from adaptc.state.runner import Runner


class StepRunner(Protocol):
    """A program, a package of one, an adapter bound to either, or a bank."""

    @property
    def binding(self) -> Any:
        """Return the adapter that calls use."""
        ...

    @property
    def device(self) -> torch.device: ...

    def snapshot_call(self) -> Runner:
        """Return a runner that keeps the current adapter."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
