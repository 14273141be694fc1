"""A small saved program with everything that a file has: symbols, a constant, a buffer, an adapter, keyword inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor, *, gain: Tensor, mode: str = "plain") -> dict[str, Any]:
        h = torch.relu(self.first(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        return {"y": self.second(h) * gain + self.shift, "rows": x.shape[0] * 2}


def small_inputs(rows: int = 4) -> tuple[tuple[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, 5, generator=g),), {"gain": torch.rand(3, generator=g), "mode": "plain"}


def save_small(path: Path) -> Any:
    """Saved to ``path``; returns the program."""
    torch.manual_seed(3)
    args, kwargs = small_inputs()
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}, "gain": None, "mode": None}
    exported = torch.export.export(Small(), args, kwargs, dynamic_shapes=shapes)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["first"], init_lora_weights=False)
    program = adaptc.compile(exported, config)
    adaptc.save(program, path)
    return program


def outputs(program: Any, rows: int = 11) -> list[Any]:
    args, kwargs = small_inputs(rows)
    out = program(*args, **kwargs)
    return [out["y"].detach(), int(out["rows"])]


def outputs_are_equal(a: list[Any], b: list[Any]) -> bool:
    return a[0].shape == b[0].shape and torch.equal(a[0], b[0]) and a[1] == b[1]


def check_read_without_adaptc(program: Any, x: Tensor, folder: Path) -> Any:
    """Check that a process without adaptc computes the same from the saved ``program``, and return it loaded again."""
    adaptc.save(program, folder / "program.pt2")
    torch.save([x, program(x)], folder / "expected.pt")
    code = (
        "import sys, torch\n"
        "x, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.export.load('program.pt2').module()(x), expected)\n"
        "assert not any(m.partition('.')[0] == 'adaptc' for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, check=True)
    loaded = adaptc.load(folder / "program.pt2")
    assert torch.equal(loaded(x), program(x))
    return loaded
