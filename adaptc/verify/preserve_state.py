"""Run programs and models and leave them as they were: modes, and buffers that a call writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.export import ExportedProgram


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
    """Buffers that calls may write to (caches, statistics): ``restore`` puts them back, and so does the end."""

    def __init__(self, program: ExportedProgram | None, model: Any) -> None:
        tensors: list[torch.Tensor] = []
        if program is not None:
            held = {**program.constants, **program.state_dict}
            written = program.graph_signature.buffers_to_mutate.values()
            tensors += [held[f] for f in written if f in held]
        tensors += list(model.buffers()) if isinstance(model, nn.Module) else []
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
