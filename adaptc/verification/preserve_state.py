"""Restore the tensors that calls of programs write to; ``adaptc.capture.model_state`` does it for modules."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.export import ExportedProgram

from adaptc.passes.analysis.program_facts import written_tensors
from adaptc.state.runner import Runner


class BufferSnapshot:
    """The tensors that calls may write to (caches, statistics), with copies of their values.

    :meth:`restore` writes the copies back; so does the end of a ``with`` block.
    """

    def __init__(self, program: ExportedProgram | None, model: Any) -> None:
        tensors: list[torch.Tensor] = []
        for p in (program, model):
            tensors += written_tensors(p) if isinstance(p, ExportedProgram) else []
        if isinstance(model, Runner):
            tensors += model.state.values()
        self.copies = [(t, t.detach().clone()) for t in tensors]

    def restore(self) -> None:
        for tensor, value in self.copies:
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            self.restore()
