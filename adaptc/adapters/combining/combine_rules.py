"""Combine tensors of several adapters by PEFT's rules: weighted sums, with or without pruning and sign election.

TIES: Yadav et al., arXiv 2306.01708. DARE: Yu et al., arXiv 2311.03099. Conventions are PEFT's. Signs are elected by
the tensors without their weights, a tie is positive, and a mean is over the adapters that agree with the sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptc.adapters.combining.combine_options import CombineOptions


def combine_by_rule(tensors: Sequence[Tensor], weights: Sequence[float], options: CombineOptions) -> Tensor:
    """Return the combined tensor. Where sizes differ, as ranks may, shorter tensors are padded with zeros."""
    if options.pruning and options.density is not None and options.density < 1:
        tensors = [_prune(t, options.density, options) for t in tensors]
    largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stack = torch.stack([_pad_to_shape(t, largest) for t in tensors])
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).reshape(-1, *[1] * len(largest))
    if not options.elects_signs:
        return weighted.sum(0)
    signs = stack.sign()
    votes = stack.sum(0) if options.majority_sign_method == "total" else signs.sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0).to(signs)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _prune(t: Tensor, density: float, options: CombineOptions) -> Tensor:
    if options.pruning == "random":
        device = t.device if options.generator is None else options.generator.device
        kept = torch.bernoulli(torch.full(t.shape, density, dtype=t.dtype, device=device), generator=options.generator)
        return t * kept.to(t.device) / density
    flat = t.reshape(-1)
    largest = torch.topk(flat.abs(), int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).reshape(t.shape)


def _pad_to_shape(t: Tensor, shape: Sequence[int]) -> Tensor:
    room = [n for want, have in zip(reversed(shape), reversed(t.shape), strict=True) for n in (0, want - have)]
    return pad(t, room) if any(room) else t
