"""Small models with LoHa and LoKr, by PEFT and by adaptc, for the tests of the two."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adaptc

CONFIGS = ("LoHaConfig", "LoKrConfig")


class NamedLayers(nn.Module):
    """Layers in a row, called a, b, ..."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for name, layer in zip("abc", layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.named_children():
            x = layer(x)
        return x


def make_layers(*layers: nn.Module) -> NamedLayers:
    torch.manual_seed(2)
    for p in (p for layer in layers for p in layer.parameters()):
        nn.init.normal_(p, std=0.3)
    return NamedLayers(*layers).double().eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def peft_wrapped(model: nn.Module, cls: str, seed: int = 4, **config: Any) -> Any:
    """PEFT's model, its adapter as PEFT makes it from this seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), getattr(peft, cls)(**config)).eval()


def save_peft_adapter(model: nn.Module, cls: str, path: Path, **config: Any) -> Any:
    """PEFT's model with random adapter tensors, which are also at ``path``."""
    out = peft_wrapped(model, cls, **config)
    with torch.no_grad():
        for p in out.parameters():
            if p.requires_grad:
                p.normal_(std=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out.save_pretrained(str(path))
    return out


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def slots_by_file_key(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    """Key in files -> the program's own tensor."""
    return {
        a.file_key(n, s): program.binding.values[a.slots[n]]
        for a in program.adaptation.attachments
        for n, s in a.method.slots(program.ops[a.id]).items()
    }


def randomize(program: adaptc.AdaptedProgram) -> adaptc.AdaptedProgram:
    torch.manual_seed(8)
    with torch.no_grad():
        for t in slots_by_file_key(program).values():
            t.normal_(std=0.6)
    return program
