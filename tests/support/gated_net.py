"""What tests of one program over time share: a net of siblings and a layer behind them, and adapters for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
SITES = {"up": (7, 5), "side": (7, 5), "down": (3, 7)}


class Gated(nn.Module):
    """Two siblings, which share a product, and a layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.side(x))


def net() -> Gated:
    """The same values always, also where other threads draw from torch's generator."""
    torch.manual_seed(3)
    g, made = torch.Generator().manual_seed(3), Gated().eval()
    for p in made.parameters():
        nn.init.uniform_(p, -0.4, 0.4, generator=g)
    return made


def config(rank: int, **options: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=list(SITES), **options)


def adapter_tensors(rank: int, size: float = 1.0) -> dict[str, Tensor]:
    """An adapter that its rank seeds, with PEFT's keys; values of about ``size``."""
    g = torch.Generator().manual_seed(rank)
    a = {f"{n}.lora_A.weight": torch.randn(rank, i, generator=g) * size for n, (_, i) in SITES.items()}
    return a | {f"{n}.lora_B.weight": torch.randn(o, rank, generator=g) * size for n, (o, _) in SITES.items()}


def compile_net(rank: int = 2, **options: Any) -> adaptc.AdaptedProgram:
    """A program of the net with the adapter ``state(rank)``."""
    program = adaptc.compile(net(), config(rank, init_lora_weights=False), example_inputs=torch.randn(2, 5), **options)
    adaptc.swap(program, adapter_tensors(rank))
    return program
