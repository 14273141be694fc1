"""Two adapters of a method at several layers of several sizes, so that what an adapter shares is shared by all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from tests.support.subject import Subject, adapter_parameters, quiet


class Several(nn.Module):
    """Two layers of one size, and one of another."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        inner, outer = widths
        layers = {"a": (inner, outer), "b": (inner, outer), "c": (outer, inner)}
        self.parts = nn.ModuleDict({n: nn.ModuleDict({"layer": nn.Linear(*sizes)}) for n, sizes in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (part["layer"] for part in self.parts.values())
        return c(torch.tanh(a(x)) + b(x)) + x


def at_several_layers(s: Subject, **options: Any) -> tuple[list[adaptc.AdaptedProgram], Tensor]:
    """Programs of one base with random adapters of the entry's config and of its other one, and an input."""
    torch.manual_seed(3)
    base, x = Several(s.entry.widths).double(), torch.randn(5, s.entry.widths[0], dtype=torch.float64)
    # These divide a layer's outputs by a number that does not divide its inputs.
    one_size = {"exclude_modules": ["parts.c.layer"]} if s.entry.name.startswith(("road", "miss_mini")) else {}
    programs: list[adaptc.AdaptedProgram] = []
    for changes in ({}, s.entry.other_config):
        with quiet():
            programs.append(adaptc.compile(base, s.config(**one_size, **changes), example_inputs=x, **options))
        with torch.no_grad():
            for key, p in adapter_parameters(programs[-1]).items():
                if p.is_floating_point():
                    p.copy_(s.entry.random_tensor(key, p))
    return programs, x
