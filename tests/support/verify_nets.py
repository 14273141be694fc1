"""A small model with everything a verification meets, and the names of its checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

BASE, IDENTITY, MERGED, UNMERGE = (
    "base equals model",
    "identity equals base",
    "merged equals adapted",
    "unmerge is bitwise",
)


class Net(nn.Module):
    """Token ids in, a dict of tuples out, with a dropout that eval mode must turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 6)
        self.up = nn.Linear(6, 10)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        h = self.up(self.embed(ids)) * mask.unsqueeze(-1)
        return {"pair": (h, self.head(self.drop(torch.tanh(h)))), "argmax": h.argmax(-1)}


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def compile_net(model: Net, init: Any = False, **options: Any) -> adaptc.AdaptedProgram:
    example = {"ids": torch.randint(0, 23, (3, 9)), "mask": torch.ones(3, 9, dtype=torch.int64)}
    config = LoraConfig(r=3, target_modules=["up", "head"], init_lora_weights=init, **options)
    return adaptc.compile(model, config, example_inputs=example)


def failed(report: Any) -> list[str]:
    return [c.name for c in report.checks if c.passed is False]
