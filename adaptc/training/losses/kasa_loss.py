"""Compute the loss term of KaSA, which keeps its singular values small and its factors near orthogonal.

Wang et al., arXiv 2412.06071, equations 9 to 12; it is the value of PEFT's ``_get_kasa_loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.methods.lora_family.lora import by_expert
from adaptc.methods.lora_family.variants.kasa import DIAGONAL, Kasa, KasaConfig
from adaptc.state.core import ProgramCore
from adaptc.training.losses.method_sites import adapters_with
from adaptc.training.program_module import ProgramModule


def kasa_loss(program: ProgramCore | ProgramModule) -> Tensor:
    """Return the term that KaSA adds to a loss: ``beta`` |d|^2 + ``gamma`` (|B^T B - I| + |A A^T - I|), of all layers.

    The caller adds it before ``backward()``; ``trainer_callback`` does so in a Trainer. The norms are Frobenius'. The
    factors are those of each adapter's :class:`adaptc.KasaConfig`. PEFT returns 0 for a model without KaSA.

    Args:
        program: a program with an adapter of KaSA, or a module of one.

    Returns:
        a scalar in float32, or float64 for an adapter in float64.

    Raises:
        AdaptcError: the program has no adapter of KaSA.

    Example:
        >>> config = adaptc.LoraConfig(r=3, kasa_config=adaptc.KasaConfig(), target_modules=["0"])
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> loss = adapted.module()(x).sum() + adaptc.training.kasa_loss(adapted)
        >>> loss.backward()
    """
    terms: list[Tensor] = []
    for config, sites in adapters_with(program, Kasa):
        options = KasaConfig.from_value(config.kasa_config)
        for op, values in sites:
            slots = {name: _float32_or_wider(t) for name, t in values.items()}
            A, B, *_ = slots.values()
            A, B = by_expert(op, A, B) if op.experts else (A.flatten(1), B.flatten(1))
            terms.append(options.beta * slots[DIAGONAL].square().sum() + options.gamma * _orthogonality(A, B))
    if not terms:
        raise AdaptcError("the program has no adapter of KaSA: its LoraConfig has no kasa_config")
    return torch.stack([t.to(terms[0].device) for t in terms]).sum()


def _orthogonality(A: Tensor, B: Tensor) -> Tensor:
    """Return |B^T B - I| + |A A^T - I| of matrices, summed over the first axis where there are three."""
    identity = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    return sum(torch.linalg.matrix_norm(P - identity).sum() for P in (B.mT @ B, A @ A.mT))  # type: ignore[return-value]


def _float32_or_wider(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
