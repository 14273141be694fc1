"""Equal blocks in a row, for gradient checkpointing of what methods do in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptc


class Blocks(nn.Module):
    """(batch, 11) -> (batch, 11), by three blocks of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(11, 17), "down": nn.Linear(17, 11)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def trained_tensors(gradient_checkpointing: bool, seed: int, **options: Any) -> dict[str, Tensor]:
    """Return the gradients and the slots of LoRA with these options, by name, after two forwards and backwards."""
    torch.manual_seed(seed)
    model, x = Blocks().double(), torch.randn(5, 11, dtype=torch.float64)
    config = adaptc.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False, **options)
    program = adaptc.compile(
        model, config, example_inputs=x, training=True, generator=torch.Generator().manual_seed(seed)
    )
    module = program.module(gradient_checkpointing=gradient_checkpointing)
    assert (module.checkpoint_every is not None) == gradient_checkpointing
    for n in (1, 2):
        module.zero_grad()
        torch.manual_seed(seed + n)
        module(x * n).square().sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return grads | {n: b.clone() for n, b in module.named_buffers()}
