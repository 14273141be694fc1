"""Train each adapter alone, as the oracle of a bank that trains many: the gated net with LoRA, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support.gated_net import SITES, net

ALPHA = 5


def config(rank: int, layers: Sequence[str] = tuple(SITES), **options: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(layers), init_lora_weights=False, **options)


def program(dtype: torch.dtype = torch.float64, **options: Any) -> adaptc.AdaptedProgram:
    """A program of the net that trains, for banks of any adapter with a config of :func:`config`."""
    x = torch.randn(2, 5, dtype=dtype)
    return adaptc.compile(net().to(dtype), config(3, **options), example_inputs=x, training=True)


def values_of(binding: Any) -> dict[str, Tensor]:
    """Name of a layer and of its slot -> the value, for the layers that the adapter has."""
    kinds = ("lora_A", "lora_B")
    layers = {i.split(".")[0] for i in map(str, (a for a in binding.methods))}
    found = {}
    for fqn, t in binding.values.items():
        kind = next((k for k in kinds if k in fqn), None)
        if kind and fqn.split(".")[0] in layers:
            found[fqn.split(".")[0], kind] = t
    return found


class Alone:
    """One adapter of the net, trained by torch alone from the values that ``binding`` has now."""

    def __init__(self, binding: Any, rank: int, optimizer: Any, scheduler: Any = None, clip: Any = None) -> None:
        self.parameters = {k: nn.Parameter(t.detach().clone()) for k, t in values_of(binding).items()}
        dtype = next(iter(self.parameters.values())).dtype
        self.net, self.scale, self.clip = net().to(dtype), ALPHA / rank, clip
        self.optimizer = (optimizer or torch.optim.AdamW)(list(self.parameters.values()))
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.steps = 0

    def _layer(self, name: str, x: Tensor) -> Tensor:
        y = getattr(self.net, name)(x)
        if (name, "lora_A") in self.parameters:
            y = y + (x @ self.parameters[name, "lora_A"].T) @ self.parameters[name, "lora_B"].T * self.scale
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer("down", torch.tanh(self._layer("up", x)) * self._layer("side", x))

    def backward(self, x: Tensor, target: Tensor) -> float:
        found = loss(self(x), target)
        found.backward()
        return float(found.detach())

    def step(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.steps += 1


def loss(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


def batch(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=draw).to(dtype), torch.randn(rows, 3, generator=draw).to(dtype)


def assert_equal(bank: Any, name: str, alone: Alone, tolerance: float = 1e-9) -> None:
    """The bank's adapter has the values of the one that was trained alone."""
    found = values_of(bank[name])
    assert found.keys() == alone.parameters.keys()
    for key, t in alone.parameters.items():
        torch.testing.assert_close(found[key].detach(), t.detach(), rtol=tolerance, atol=tolerance)
    assert bank.trainer(name).steps == alone.steps
