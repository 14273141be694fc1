"""Each method next to PEFT's on the same sites: forward time over the base's, and the size of the adapter file.

All 210 linear layers of SmolLM2's blocks, one interleaved run per method. A binding is warm when it is timed, as
PEFT's wrapped model is: what depends on frozen tensors alone has been computed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import adaptc
from tests.benchmarks.harness import interleave
from tests.benchmarks.model import smollm2, tokens
from tests.support.method_options import METHODS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ROW_SHARDED = ["o_proj", "down_proj"]
#: variants of LoRA that PEFT's configs turn on: name -> options
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "KaSA": ("LoraConfig", {"r": 16, "kasa_config": peft.KasaConfig()}),
    "BD-LoRA": (
        "LoraConfig",
        {
            "r": 16,
            "use_bdlora": peft.BdLoraConfig(
                target_modules_bd_a=_ROW_SHARDED,
                target_modules_bd_b=[t for t in TARGETS if t not in _ROW_SHARDED],
                nblocks=2,
            ),
        },
    ),
    "MonteCLoRA": ("LoraConfig", {"r": 16, "monteclora_config": peft.MontecloraConfig()}),
    "VeLoRA": ("LoraConfig", {"r": 16, "velora_config": peft.VeloraConfig()}),
}


@dataclass(frozen=True)
class Line:
    """Times are medians in milliseconds; ``size`` of the adapter file in bytes."""

    method: str
    work: str
    base: float
    peft: float
    adaptc: float
    size: int

    def __str__(self) -> str:
        ratios = f"{self.peft / self.base:.2f} | {self.adaptc / self.base:.2f} | {self.peft / self.adaptc:.2f}"
        return f"| {self.method} | {self.work} | {self.base:.1f} | {ratios} | {self.size / 1e6:.2f} |"


def run(rounds: int = 9, only: list[str] | None = None) -> list[Line]:
    warnings.filterwarnings("ignore")
    base = smollm2()
    plain = adaptc.unload(adaptc.compile(base, adaptc.LoraConfig(r=2, target_modules=TARGETS)))
    lines: list[Line] = []
    for method, (name, options) in {**METHODS, **VARIANTS}.items():
        if only and method not in only:
            continue
        config = getattr(peft, name)(**{"target_modules": TARGETS, **options})
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.02)
        for p in theirs.parameters():
            p.requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
            ours = adaptc.compile(plain, folder)
        check(theirs, ours, method)
        for work, inputs in (("decode 1x1", tokens(1, 1)), ("prefill 1x64", tokens(1, 64))):
            sides = {"base": plain, "PEFT": theirs, "adaptc": ours}
            rows = interleave(work, {k: no_grad(f, inputs) for k, f in sides.items()}, "base", rounds)
            lines.append(Line(method, work, *(r.milliseconds for r in rows), size))
    return lines


def no_grad(fn: Callable[..., object], inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            fn(**inputs)

    return call


def check(theirs: Any, ours: Any, method: str) -> None:
    """Both compute the same, or their times mean nothing."""
    with torch.no_grad():
        a, b = ours(**tokens(2, 9)).logits, theirs(**tokens(2, 9)).logits
    worst = float((a - b).abs().max() / b.abs().max())
    if worst > 1e-3:
        raise AssertionError(f"{method}: outputs differ by {worst:.1e} of the largest")


def markdown(lines: list[Line]) -> str:
    heads = "| method | work | base ms | PEFT / base | adaptc / base | PEFT / adaptc | file MB |"
    return "\n".join([heads, "|---|---|---:|---:|---:|---:|---:|", *map(str, lines)])
