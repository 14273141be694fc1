"""The picture of the README, examples/layer.svg: `python -m tests.pictures.readme_picture` draws it anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import adaptc
from tests.support.guides import ROOT

PICTURE = ROOT / "examples" / "layer.svg"


class Projection(nn.Module):
    """A layer with the sizes of SmolLM2-135M's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(576, 576, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def draw_picture(path: Path) -> None:
    torch.manual_seed(0)
    config = adaptc.LoraConfig(r=16, target_modules=["q_proj"])
    program = adaptc.compile(Projection().eval(), config, example_inputs=torch.randn(2, 7, 576))
    adaptc.draw(program, path)


if __name__ == "__main__":
    draw_picture(PICTURE)
