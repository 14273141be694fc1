"""A small model of blocks, by PEFT and by adaptc, for the tests of methods that know matrices only."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adaptc


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(11, 7)
        self.down = nn.Linear(7, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_blocks() -> tuple[nn.Module, Tensor]:
    """The model, always with the same weights, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Blocks().eval(), torch.randn(3, 11)


def peft_wrapped(config: Any, seed: int = 4, random: bool = False) -> Any:
    """PEFT's model, its adapter as PEFT makes it from this seed, or random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_blocks()[0]
        torch.manual_seed(seed)
        out = peft.get_peft_model(model, config).eval()
    for p in out.parameters() if random else ():
        if p.requires_grad:
            nn.init.normal_(p)
    return out


def compile_blocks(adapter: Any, **options: Any) -> adaptc.AdaptedProgram:
    model, x = make_blocks()
    return adaptc.compile(model, adapter, example_inputs=x, **options)


def differing_fields(peft_config: Any, config: Any) -> dict[str, Any]:
    """Fields of two configs that are not the same; what only says which library made them, and where, is left out."""
    a, b = ({f.name: getattr(c, f.name) for f in dataclasses.fields(c)} for c in (peft_config, config))
    names = (a.keys() | b.keys()) - {"peft_type", "peft_version"}
    missing = object()
    out = {n: (a.get(n, missing), b.get(n, missing)) for n in names}
    # Which layers to choose, PEFT does not let every method say in every way.
    chosen = {f.name for f in dataclasses.fields(adaptc.methods.TargetedConfig)}
    return {n: v for n, v in out.items() if v[0] != v[1] and not (v[0] is missing and n in chosen)}
