"""Adapters to combine: a small model, adapters of it that PEFT wrote, and PEFT's own combinations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.oracle import EXPECTED_WARNINGS as USUAL
from tests.support.oracle import quiet

#: PEFT has one such option for all layers of an adapter, and sets it for each
EXPECTED_WARNINGS = (*USUAL, "fan_in_fan_out is set to True.*")
TARGETS = ["table", "up", "mix", "turned", "down"]


class Net(nn.Module):
    """A layer of each kind that LoRA has a form of its own for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 10)
        self.up = nn.Linear(10, 7)
        self.mix = nn.Conv2d(7, 6, (3, 1), padding=(1, 0))
        self.turned = Conv1D(9, 6)
        self.down = nn.Linear(9, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.table(ids)))
        x = torch.tanh(self.mix(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2).contiguous())
        return self.down(torch.tanh(self.turned(x)))


IDS = torch.randint(0, 13, (3, 4), generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(7)
    return Net().requires_grad_(False).eval()


def peft_model(configs: Sequence[Any], model: nn.Module | None = None) -> peft.PeftModel:
    """Adapters "0", "1", ... with random values, in one model."""
    with quiet(*EXPECTED_WARNINGS):
        wrapped = peft.get_peft_model(net() if model is None else model, configs[0], adapter_name="0")
        for i, config in enumerate(configs[1:], 1):
            wrapped.add_adapter(str(i), config)
    with torch.no_grad():
        for i in range(len(configs)):
            g = torch.Generator().manual_seed(i)
            for name, p in sorted(wrapped.named_parameters()):
                if f".{i}." in f"{name}." and ("lora_" in name or "ia3_" in name or "modules_to_save" in name):
                    p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return wrapped.eval()


def save_adapters(wrapped: peft.PeftModel, root: Path) -> list[Path]:
    """A directory for each adapter."""
    with quiet(*EXPECTED_WARNINGS):
        for i in wrapped.peft_config:
            wrapped.save_pretrained(str(root), selected_adapters=[i])
    return [root / i for i in wrapped.peft_config]


def changes(wrapped: peft.PeftModel, name: str) -> dict[str, Tensor]:
    """What PEFT adds to each weight for one adapter, by module."""
    found = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, BaseTunerLayer) and name in module.scaling:
            found[path.removeprefix("base_model.model.")] = module.get_delta_weight(name).detach()
    return found


def load_peft_adapter(path: Path, model: nn.Module | None = None) -> peft.PeftModel:
    with quiet(*EXPECTED_WARNINGS[1:]):
        return peft.PeftModel.from_pretrained(net() if model is None else copy.deepcopy(model), str(path)).eval()
