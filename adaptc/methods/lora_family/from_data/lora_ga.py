"""LoRA-GA: first A and B of the gradient of the weight (Wang, Yu and Li, arXiv 2407.05000).

G = U S V^T is the mean gradient of the loss by the weight, of which 2 r terms are kept. ``direction`` says which of
them are A and which are B. "ArB2r" makes A of the first r rows of V^T and B of the next r columns of U S. "A2rBr" does
it the other way round. "ArBr" takes every second term for A and the others for B, and "random" the same r for both. W
loses s B A, so the first step of training changes it as full fine-tuning would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.global_generator import global_generator_of
from adaptc.methods.lora_family.from_data.data_options import DataOptions

#: subspace iterations that find singular terms
ITERATIONS = 4


@dataclass
class LoraGAConfig(DataOptions):
    """PEFT's ``LoraGAConfig``: same names, same defaults, for ``LoraConfig(init_lora_weights="lora_ga")``.

    Raises ConfigError for values without a meaning.

    Attributes:
        direction: which singular terms of the gradient A and B are made of.
        scale: "stable" multiplies B by out^(1/4) / sqrt(stable_gamma). "weight_svd" gives B the largest singular value
            of the weight, "gd_scale" divides both by the scale of the adapter, "unit" does nothing.
        stable_gamma: the divisor of "stable". In PEFT "stable" takes ``in`` for ``out`` at a ``Conv1D``.

    Example:
        >>> options = adaptc.LoraGAConfig(direction="ArBr", scale="unit")
        >>> config = adaptc.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=options)
    """

    scheme: ClassVar[str] = "lora_ga"
    option: ClassVar[str] = "lora_ga_config"

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stable_gamma < 1:
            raise ConfigError(f"LoraGAConfig.stable_gamma must be a positive integer, got {self.stable_gamma}")


@torch.no_grad()
def lora_ga_factors(
    W: Tensor, gradient: Tensor, r: int, scale: float, options: LoraGAConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) for ``W`` and its ``gradient``, both (out, in); float32 or wider.

    ``generator`` draws the start of the subspace iterations and the terms of "random"; None for torch's global one.
    """
    gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
    with global_generator_of(generator, W.device):
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=ITERATIONS)
        first, second = torch.arange(r), torch.arange(r, 2 * r)
        drawn = torch.randperm(2 * r)[:r] if options.direction == "random" else first
        of_a, of_b = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (2 * first + 1, 2 * first),
            "random": (drawn, drawn),
        }[options.direction]
        of_a, of_b = of_a.to(S.device), of_b.to(S.device)
        A, B, values = V.mT[of_a], U[:, of_b] * S[of_b], S[of_b]
        if options.scale == "stable":
            B = B * (W.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "gd_scale":
            A, B = A / scale, B / scale
        elif options.scale == "weight_svd" and bool(values[0] > 0):
            wide = W.detach().to(gradient.dtype)
            B = B * (torch.svd_lowrank(wide, q=r, niter=ITERATIONS)[1][0] / values[0])
    return A, B
