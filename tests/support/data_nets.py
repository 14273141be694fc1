"""A net and batches for first values that are made of data: two layers that read one input, and a transposed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from tests.support.site_checks import adapter_parameters

IDS = torch.tensor([[1, 5, 2, 9], [8, 0, 16, 4]])


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"ids": torch.randint(17, (2, 4), generator=generator)} for _ in range(4)]


BATCHES = _batches()


class DataNet(nn.Module):
    """An embedding, two linear layers that read its rows, and one of transformers' transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.left, self.right = nn.Embedding(17, 7), nn.Linear(7, 11), nn.Linear(7, 11, bias=False)
        self.down = Conv1D(9, 11)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        return self.down(torch.tanh(self.left(rows)) * self.right(rows))


class LanguageNet(DataNet):
    """The net with the inputs of a language model, of which it reads the mask, too."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(input_ids) * attention_mask[..., None]

    @classmethod
    def make(cls) -> LanguageNet:
        model = cls().eval()
        model.load_state_dict(data_net().state_dict())
        return model


def data_net() -> DataNet:
    torch.manual_seed(2)
    model = DataNet().eval()
    nn.init.normal_(model.down.weight, std=0.3)
    nn.init.normal_(model.down.bias)
    return model


def peft_sites(model: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return name -> A, B and the base weight as it is stored, of each layer with LoRA in a model of PEFT."""
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            tensors = (module.lora_A["default"].weight, module.lora_B["default"].weight, module.base_layer.weight)
            found[name] = tuple(t.detach().clone() for t in tensors)  # type: ignore[assignment]
    return found


def factors(program: adaptc.AdaptedProgram, site: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a site of the current adapter."""
    found = adapter_parameters(program)
    return found[f"{site}.lora_A.weight"].detach(), found[f"{site}.lora_B.weight"].detach()


def both_losses(module: Any) -> tuple[list[float], Tensor]:
    """Return the losses of some steps of training, and the outputs afterwards."""
    own = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.05)
    target, losses = torch.linspace(-1, 1, 72).reshape(2, 4, 9), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(ids=IDS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module(ids=IDS).detach()
