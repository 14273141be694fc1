"""Arrow next to PEFT's: LoRA adapters of a family in directories, PEFT's model of them, and its rule at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor, nn

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import EXPECTED_WARNINGS, quiet

TARGETS = {"gpt2": ["c_attn", "c_fc"]}


def targets(family: str) -> list[str]:
    return TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])


@torch.no_grad()
def save_random_lora(family: str, path: Path, seed: int, r: int = 3, dominant: bool = False, **options: Any) -> Path:
    """A LoRA adapter of PEFT's with random values, saved to ``path``. ``dominant``: the first singular value is far
    above the others, so that PEFT's fifteen steps of power iteration find its vector."""
    config = peft.LoraConfig(**{"r": r, "target_modules": targets(family), **options})
    generator = torch.Generator().manual_seed(seed)
    with quiet(*EXPECTED_WARNINGS):
        model = peft.get_peft_model(FAMILIES[family].build(), config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
                if dominant:
                    (p[1:] if "lora_A" in name else p[:, 1:]).mul_(0.05)
        model.save_pretrained(str(path))
    return path


def peft_model(
    family: str,
    tasks: Sequence[Path],
    general: Sequence[Path] | None = None,
    *,
    exact_prototypes: bool = True,
    **options: Any,
) -> Any:
    """PEFT's Arrow model; ``exact_prototypes``: with the singular vectors that torch finds in place of its own."""
    with quiet(*EXPECTED_WARNINGS):
        made = peft.create_arrow_model(
            FAMILIES[family].build(),
            [str(p) for p in tasks],
            peft.ArrowConfig(**options),
            None if general is None else [str(p) for p in general],
        ).eval()
    if exact_prototypes:
        with torch.no_grad():
            made(**FAMILIES[family].inputs(1, 3))
        for layer in made.modules():
            for arrow in getattr(layer, "lora_arrow", {}).values():
                pairs = [(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in arrow.task_adapter_names]
                arrow.prototypes = torch.stack([prototype(a, b) for a, b in pairs])
    return made


def prototype(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svd(b.double() @ a.double()).Vh[0].to(a.dtype).detach()


def random_lora_adapter(
    ranks: int, alpha: float, seed: int, rows: int = 5, columns: int = 7, **options: Any
) -> adaptc.Adapter:
    """A LoRA adapter of a module "layer", in float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(ranks, columns, generator=generator, dtype=torch.float64)
    b = torch.randn(rows, ranks, generator=generator, dtype=torch.float64)
    config = adaptc.LoraConfig(r=ranks, lora_alpha=alpha, target_modules=["layer"], **options)
    return adaptc.Adapter(config, {"layer.lora_A.weight": a, "layer.lora_B.weight": b}, f"lora {seed}")


def peft_arrow_layer_output(adapters: Sequence[adaptc.Adapter], x: Tensor, top_k: int, temperature: float) -> Tensor:
    """What PEFT's layer adds for these adapters, filled up to one rank, which it needs."""
    config = peft.ArrowConfig(top_k=min(top_k, len(adapters)), router_temperature=temperature)
    names = [f"task_{i}" for i in range(len(adapters))]
    config.task_adapter_names, config.gks_adapter_names = names, []
    layer = ArrowLoraLinearLayer(x.shape[-1], config)
    max_rank = max(a.config.r for a in adapters)
    halves: tuple[dict[str, nn.Linear], dict[str, nn.Linear]] = ({}, {})
    prototypes = []
    for name, adapter in zip(names, adapters, strict=True):
        a, b = adapter.tensors.values()
        prototypes.append(prototype(a, b))
        padding = max_rank - a.shape[0]
        a, b = nn.functional.pad(a, (0, 0, 0, padding)), nn.functional.pad(b, (0, padding))
        for half, weight in zip(halves, (a, b), strict=True):
            half[name] = nn.Linear(*reversed(weight.shape), bias=False)
            half[name].weight = nn.Parameter(weight)
    layer.prototypes = torch.stack(prototypes)
    scaling = {n: a.config.lora_alpha / a.config.r for n, a in zip(names, adapters, strict=True)}
    return layer(x, *halves, nn.Identity(), scaling)
