"""What tests of AOTInductor packages share: a net of every layout of a rank, adapters for it, and a package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.packages.packaged_program import PackagedProgram

aten = torch.ops.aten
SIZES = [(2, 5), (3, 7), (7, 2), (5, 11)]


class Net(nn.Module):
    """Every layout of a rank: plain, embedding, grouped convolution, stacked experts; and whole weights as slots."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding=1, groups=3)
        self.lin = nn.Linear(9, 13)
        self.experts = nn.Parameter(torch.randn(4, 5, 13))
        self.head = nn.Linear(5, 1)  # a bias of one element: compilers take such for numbers

    def forward(self, x: Tensor, *, ids: Tensor, gain: Tensor) -> dict[str, Tensor | None]:
        h = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        h = torch.tanh(self.lin(h)) + x
        h = torch.einsum("bsi,eoi->bseo", h, self.experts).relu().sum(2)
        return {"y": self.head(h) * gain, "nothing": None, "hidden": h}


def net_inputs(batch: int, seq: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(100 * batch + seq)
    ids = torch.randint(0, 11, (batch, seq), generator=g)
    return (torch.randn(batch, seq, 13, generator=g),), {"ids": ids, "gain": torch.rand(3, generator=g)}


NET_CONFIG = LoraConfig(
    r=3, target_modules=["emb", "conv", "lin"], target_parameters=["experts"], modules_to_save=["head"]
)


def adapter(
    program: Any, config: LoraConfig, keeps_site: Callable[[str], bool] = lambda fqn: True, seed: int = 1
) -> dict[str, Tensor]:
    """Random tensors, none of them zero, for the sites that ``keeps_site`` picks, with the options of ``config``."""
    g = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for a in program.adaptation.attachments:
        if keeps_site(a.fqn):
            for name, spec in a.method.rebind(config, a).slots(program.ops[a.id]).items():
                out[f"{a.key}.{name}" if a.key else name] = 0.5 * torch.randn(spec.shape, generator=g)
    return out


@dataclass
class Packaged:
    program: Any
    runner: PackagedProgram
    path: Path
    model: Any = None

    def check_same_outputs(self, *sizes: tuple[int, int]) -> None:
        """The runner computes what the program does, at several sizes."""
        for size in sizes or SIZES:
            args, kwargs = net_inputs(*size)
            got, want = self.runner(*args, **kwargs), self.program(*args, **kwargs)
            assert got["nothing"] is None
            for key in ("y", "hidden"):
                torch.testing.assert_close(got[key], want[key], rtol=2e-5, atol=2e-5)

    def swap(self, tensors: dict[str, Tensor], config: LoraConfig) -> Any:
        adaptc.swap(self.program, tensors, config=config)
        return self.runner.swap(tensors, config=config)
