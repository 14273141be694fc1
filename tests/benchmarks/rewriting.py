"""What rewriting costs: injection against capture on SmolLM2, and how it grows on a synthetic chain of linears."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.capture.capture import capture
from tests.benchmarks.model import RANK, smollm2


class Chain(nn.Module):
    """``sites`` linear layers in a row."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7, bias=False) for _ in range(sites)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def exported_chain(sites: int) -> torch.export.ExportedProgram:
    dims = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(Chain(sites), (torch.randn(3, 7),), dynamic_shapes=dims, strict=False)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def run(full: bool = True) -> str:
    model = smollm2()
    captured, capture_s = timed(lambda: capture(model))
    program, inject_s = timed(lambda: adaptc.compile(captured.program, LoraConfig(r=RANK, target_modules="all-linear")))
    sites = len(program.adaptation.attachments)
    share = f"{inject_s / capture_s:.1%}"
    lines = [
        "| program | sites | capture s | inject s | inject / capture | ms per site |",
        "|---|---:|---:|---:|---:|---:|",
        f"| SmolLM2-135M | {sites} | {capture_s:.2f} | {inject_s:.2f} | {share} | {inject_s / sites * 1e3:.2f} |",
    ]
    for n in (500, 1000, 5000) if full else (500,):
        exported, export_s = timed(lambda n=n: exported_chain(n))
        _, seconds = timed(lambda e=exported: adaptc.compile(e, LoraConfig(r=3, target_modules="all-linear")))
        lines.append(
            f"| chain | {n} | {export_s:.2f} | {seconds:.2f} | {seconds / export_s:.1%} | {seconds / n * 1e3:.2f} |"
        )
    return "\n".join(lines)
