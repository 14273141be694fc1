"""MonteCLoRA: LoRA whose A is sampled around its value in training (Seth et al., arXiv 2411.04358).

In training the layer computes with A + noise, where noise = sum_i w_i * s * (Z_i diag(sqrt(u)))^T over ``num_samples``
samples, s = ``sample_scaler``. Z_i (in, r) is normal. u_k = max(exp(2 p_k) c_k, 0.001), where c_k is chi-squared with r
degrees of freedom: it is the diagonal of PEFT's Wishart sample. w is the softmax of normal values, whose means and
variances are those that approximate the Dirichlet distribution with concentrations exp(q). p and q are trained.
Inference and merged weights are LoRA's. :func:`adaptc.training.monteclora_loss` is the term for the loss.

Slots: LoRA's, and four below ``lora_monteclora_sampler``, as in PEFT. ``std_prior`` (r,) is p, and
``expert_weights_prior`` (n,) is q. ``gaussian_var_prior`` (r, r) is the diagonal matrix of the last u, and
``expert_weights`` (n,) is the last w. In training two more hold the last draws: c, and the normal values of w. The loss
computes u and w from these, with their gradients. Files have no draws.

PEFT decomposes diagonal matrices by Cholesky in float32. Here their roots are taken in the adapter's dtype. Where PEFT
finds NaN in its samples it computes without them, and here the NaN stays. PEFT's first values are those of one seed at
the first site alone: PEFT then fills a buffer with draws, and here nothing is drawn ahead. Sites are those of VeLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.methods._shared.option_checks import (
    OptionGroup,
    check_integers,
    is_in_training,
    refuse_unless_positive,
    warn_unused,
)
from adaptc.methods.lora_family.lora import LORA_NAMES, LoraFiles
from adaptc.methods.lora_family.variants.training_variant import LoraTrainingVariant
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Slot, Slots

_SAMPLER = "lora_monteclora_sampler"
STD_PRIOR, WEIGHTS_PRIOR = f"{_SAMPLER}.std_prior", f"{_SAMPLER}.expert_weights_prior"
VARIANCE, WEIGHTS = f"{_SAMPLER}.gaussian_var_prior", f"{_SAMPLER}.expert_weights"
#: the slots, in training, with the last draws: c (r,) and the normal values of w (n,)
CHI_SQUARED, NORMAL = "monteclora_chi_squared", "monteclora_normal"


@dataclass
class MontecloraConfig(OptionGroup):
    """PEFT's ``MontecloraConfig``: same names, same defaults, for ``LoraConfig(monteclora_config=...)``.

    Raises ConfigError for values without a meaning.

    Attributes:
        num_samples: the number of samples that a call in training averages.
        use_entropy: whether the loss has the sum of the squared weights of the samples, too.
        dirichlet_prior: the concentration of the prior of these weights.
        sample_scaler: the factor of the noise.
        kl_loss_weight: the factor of the divergences in the loss.
        buffer_size: has no effect: PEFT draws for so many calls at once, and here each call draws for itself.

    Example:
        >>> monteclora = adaptc.MontecloraConfig(num_samples=4, sample_scaler=1e-3)
        >>> config = adaptc.LoraConfig(monteclora_config=monteclora, target_modules=["q_proj", "v_proj"])
    """

    option: ClassVar[str] = "monteclora_config"

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"num_samples": self.num_samples, "buffer_size": self.buffer_size})
        refuse_unless_positive(self, "dirichlet_prior")
        warn_unused(self, ("buffer_size",), "here: each call draws what it needs, as if the buffer had that size")


class MontecloraFiles(LoraFiles):
    method: Monteclora

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        if not self.method.training:
            return {}
        like = {CHI_SQUARED: STD_PRIOR, NORMAL: WEIGHTS_PRIOR}
        return {name: torch.zeros_like(found[other], dtype=dtype) for name, other in like.items()}


@dataclass(frozen=True)
class Monteclora(LoraTrainingVariant):
    """MonteCLoRA at one site. The fields are those of the config; the loss reads its other options from there."""

    name: ClassVar[str] = "monteclora"
    title: ClassVar[str] = "MonteCLoRA"
    option: ClassVar[str] = "monteclora_config"
    swappable: ClassVar[frozenset[str]] = LoraTrainingVariant.swappable | {"num_samples"}
    training_options: ClassVar[frozenset[str]] = frozenset({"sample_scaler"})
    takes_complex: ClassVar[bool] = False  # a variance is real
    files = MontecloraFiles(names=(*LORA_NAMES, STD_PRIOR, WEIGHTS_PRIOR, VARIANCE, WEIGHTS))

    num_samples: int = 8
    sample_scaler: float = 1e-4

    def training_slots(self, op: Op) -> dict[str, Slot]:
        r, n = self.r, self.num_samples
        per_sample = {"free": (0,), "apart": ("samples",), "fills_up": True}
        slots = {
            STD_PRIOR: Slot((r,), free=(0,)),
            WEIGHTS_PRIOR: Slot((n,), **per_sample),
            VARIANCE: Slot((r, r), free=(0, 1), trainable=False),
            WEIGHTS: Slot((n,), trainable=False, **per_sample),
        }
        if self.training:
            slots[CHI_SQUARED] = Slot((r,), free=(0,), trainable=False, saved=False)
            slots[NORMAL] = Slot((n,), trainable=False, saved=False, **per_sample)
        return slots

    def first_training_values(
        self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        r, n = self.r, self.num_samples
        device = torch.device("cpu") if generator is None else generator.device
        # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
        p, q = (torch.rand(size, dtype=W.dtype, device=device, generator=generator) for size in (r, n))
        values = {STD_PRIOR: p, WEIGHTS_PRIOR: q, VARIANCE: torch.eye(r), WEIGHTS: torch.ones(n, dtype=W.dtype) / n}
        if self.training:
            values |= {CHI_SQUARED: torch.zeros(r), NORMAL: torch.zeros(n)}
        return {name: t.to(W.device, dtype) for name, t in values.items()}

    def is_random(self) -> bool:
        return self.drops_input() or self.training

    def trained_delta(self, op: Op, x: Tensor, slots: Slots) -> Tensor:
        A, B = self._factors(op, slots)
        return op.up(op.down(x, A + self._noise(A, slots)), B)

    def _noise(self, A: Tensor, slots: Slots) -> Tensor:
        """Return the noise of A (r, in), zero once a program is in inference; in training, write what was drawn."""
        on = is_in_training(A)
        p, q = slots[STD_PRIOR], slots[WEIGHTS_PRIOR]
        # Shapes come from slots, not from sizes, which would be constants of one adapter.
        chi_squared = torch.randn_like(slots[VARIANCE]).square().sum(-1)
        normal = torch.randn_like(q)
        u = variances(torch.where(on, p, 0), chi_squared)
        w = sample_weights(torch.where(on, q, 0), normal)
        samples = torch.randn_like(w.detach().reshape(-1, 1, 1) + A.detach())
        now = {VARIANCE: torch.diag(u), WEIGHTS: w, CHI_SQUARED: chi_squared, NORMAL: normal}
        for name, value in now.items():
            slots[name].copy_(torch.where(on, value.detach(), slots[name]))
        noise = torch.tensordot(w, samples, 1) * (self.sample_scaler * u.sqrt()).unsqueeze(-1)
        return torch.where(on, noise, 0)


def variances(p: Tensor, chi_squared: Tensor) -> Tensor:
    """Return u (r,) for ``std_prior`` (r,) and draws (r,) of the chi-squared distribution."""
    return torch.clip((2 * p).exp() * chi_squared, min=1e-3)


def sample_weights(q: Tensor, normal: Tensor) -> Tensor:
    """Return w (n,) for ``expert_weights_prior`` (n,) and draws (n,) of the normal distribution."""
    count = torch.ones_like(q).sum()
    alpha = q.exp().clamp(min=1e-6)
    variance = (1 - 2 / count) / alpha + (1 / alpha).sum() / count.square()
    mean = alpha.log() - alpha.log().mean()
    return torch.softmax((variance.clamp(min=1e-6) + 1e-6).sqrt() * normal + mean, -1)
