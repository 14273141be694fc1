"""Run programs and models and leave them as they were: modes, and the tensors that a call writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.passes.analysis.program_facts import written_tensors
from adaptc.program.bound import Bound


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode; each of its modules' flags as before afterwards."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if any(training for _, training in modes):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class Buffers:
    """What calls may write to (caches, statistics, rows of embeddings): ``restore`` puts it back, as the end does."""

    def __init__(self, program: ExportedProgram | None, model: Any) -> None:
        tensors: list[torch.Tensor] = []
        for p in (program, model):
            tensors += written_tensors(p) if isinstance(p, ExportedProgram) else []
        if isinstance(model, Bound):
            tensors += model.state.values()
        if isinstance(model, nn.Module):
            tensors += model.buffers()
            # torch's embeddings shorten rows that are too long where they are.
            limited = [m for m in model.modules() if getattr(m, "max_norm", None) is not None]
            tensors += [p for m in limited for p in m.parameters(recurse=False)]
        self.kept = [(t, t.detach().clone()) for t in tensors]

    def restore(self) -> None:
        for tensor, value in self.kept:
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            self.restore()
