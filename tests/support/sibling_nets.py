"""What tests of fused programs share: layers that read one tensor, adapters for them, and programs of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

LAYERS = ("q", "k", "v", "out")


class Block(nn.Module):
    """Three layers on one tensor, and one on what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(7, 6), nn.Linear(7, 4), nn.Linear(7, 10)
        self.out = nn.Linear(20, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], -1).tanh())


def block(dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(1)
    return Block().to(dtype).eval()


def random_rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 7, generator=torch.Generator().manual_seed(n)).to(dtype)


def adapter(rank: int, seed: int, layers: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {n: (m.out_features, m.in_features) for n, m in block().named_children()}
    out: dict[str, Tensor] = {}
    for n in layers:
        out[f"{n}.lora_A.weight"] = torch.randn(rank, sizes[n][1], generator=g, dtype=torch.float64)
        out[f"{n}.lora_B.weight"] = torch.randn(sizes[n][0], rank, generator=g, dtype=torch.float64)
    return out


def compile_block(
    model: nn.Module | None = None, targets: tuple[str, ...] = LAYERS, **options: Any
) -> adaptc.AdaptedProgram:
    dtype = options.pop("dtype", torch.float64)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), init_lora_weights=False, inference_mode=True)
    torch.manual_seed(2)
    return adaptc.compile(model or block(dtype), config, example_inputs=random_rows(2, dtype), **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
