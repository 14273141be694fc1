"""Compute the loss term of MonteCLoRA: how far its samplers are from their priors (Seth et al., arXiv 2411.04358)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.methods.lora_family.variants.monteclora import (
    CHI_SQUARED,
    NORMAL,
    STD_PRIOR,
    VARIANCE,
    WEIGHTS,
    WEIGHTS_PRIOR,
    Monteclora,
    MontecloraConfig,
    sample_weights,
    variances,
)
from adaptc.state.core import ProgramCore
from adaptc.training.losses.method_sites import adapters_with
from adaptc.training.program_module import ProgramModule


def monteclora_loss(program: ProgramCore | ProgramModule) -> Tensor:
    """Return the term that MonteCLoRA adds to a loss: the mean over the adapted layers of ``kl_loss_weight`` times
    three divergences and, with ``use_entropy``, of the sum of the squared weights of the samples. Several adapters that
    act together each have such a mean, and the sum of these is returned.

    The divergences are those of the weights' Dirichlet distribution, of the Wishart distribution of the variances, and
    of the normal distribution of the samples. The last one, and the weights, are those of what the last call in
    training drew. PEFT adds the logarithms of the gamma functions of the concentrations, where the divergence of two
    Dirichlet distributions subtracts them. So does this function, to train as PEFT does.

    PEFT's ``MontecloraTrainerMixin`` adds this term; here the caller does, after the call and before ``backward()``. In
    inference PEFT's term is zero, and this one is not: leave it out there.

    Args:
        program: a program with an adapter of MonteCLoRA, compiled with ``training=True``, or a module of one.

    Returns:
        a scalar in the adapter's dtype.

    Raises:
        AdaptcError: the program has no adapter of MonteCLoRA, or was compiled for inference.

    Example:
        >>> config = adaptc.LoraConfig(monteclora_config={"num_samples": 4}, target_modules=["0"])
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> loss = adapted.module()(x).sum() + adaptc.training.monteclora_loss(adapted)
        >>> loss.backward()
    """
    means: list[Tensor] = []
    for config, sites in adapters_with(program, Monteclora):
        options = MontecloraConfig.from_value(config.monteclora_config)
        if any(CHI_SQUARED not in slots for _, slots in sites):
            raise AdaptcError(
                "the program was compiled for inference, and draws nothing that there could be a loss of: "
                "compile(model, config, training=True)"
            )
        terms = [_site_loss(slots, options) for _, slots in sites]
        means.append(torch.stack([t.to(terms[0].device) for t in terms]).mean())
    if not means:
        raise AdaptcError("the program has no adapter of MonteCLoRA: its LoraConfig has no monteclora_config")
    return torch.stack([t.to(means[0].device) for t in means]).sum()


def _site_loss(slots: Mapping[str, Tensor], options: MontecloraConfig) -> Tensor:
    p, q, drawn = slots[STD_PRIOR], slots[WEIGHTS_PRIOR], slots[CHI_SQUARED]
    r, n = p.shape[0], q.shape[0]
    # Before the first call nothing is drawn, and what files hold is as constant as in PEFT.
    is_drawn = (drawn != 0).any()
    u = torch.where(is_drawn, variances(p, drawn), slots[VARIANCE].diagonal())
    w = torch.where(is_drawn, sample_weights(q, slots[NORMAL]), slots[WEIGHTS])
    concentration = q.exp()
    total = concentration.sum()
    prior = torch.full_like(q, options.dirichlet_prior)
    # The sign of the sum over lgamma is PEFT's.
    dirichlet = (
        torch.lgamma(total)
        - torch.lgamma(prior.sum())
        + (torch.lgamma(concentration) - torch.lgamma(prior)).sum()
        + ((concentration - prior) * (torch.digamma(concentration) - torch.digamma(total))).sum()
    )
    wishart = 0.5 * r * ((2 * p).exp().sum() - 2 * p.sum() - r)
    normal = 0.5 * n * (u.clamp(min=1e-6).sum() - u.clamp(min=1e-6).log().sum() - r)
    divergence = options.kl_loss_weight * (dirichlet + wishart + normal)
    return divergence + w.square().sum() if options.use_entropy else divergence
