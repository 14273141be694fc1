"""Compute a linear recurrence over positions in a fixed number of steps, whatever its length is.

``state[t] = decay[t] * state[t - 1] + added[t]`` goes on through a block of positions in as many steps as a block has,
for all blocks at once. What a block does as a whole is one such step. So the states at the ends of blocks follow from a
recurrence over blocks, and these from one over blocks of blocks. That last one is short. It is computed for all pairs,
which takes few operations, and little memory below some ten thousand positions.

A trace of this takes any length. Where sizes depend on the length, elements are moved by index, about which torch adds
no guards.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: the number of positions in a block
_SIDE = 8
#: how often blocks are made
_LEVELS = 2


def linear_recurrence(decay: Tensor, added: Tensor, levels: int = _LEVELS) -> Tensor:
    """Return ``state[:, t] = decay[:, t] * state[:, t - 1] + added[:, t]``, which starts with zeros.

    All are (batch, length, ...).
    """
    if not levels:
        return _by_pairs(decay, added)
    length = decay.shape[1]
    # Two blocks at least: a trace takes a single one for a constant.
    count = length // _SIDE + 2
    places = torch.arange(_SIDE, device=decay.device).unsqueeze(1) + _SIDE * torch.arange(count, device=decay.device)
    # Places after the last position have no influence on those before.
    # Indices of several dimensions: compilers take long for one that is divided by a number that depends on the length.
    places = places.clamp(max=length - 1)
    decays, addeds = (t[:, places].unbind(1) for t in (decay, added))
    states, products = [addeds[0]], [decays[0]]
    for one_decay, one_added in zip(decays[1:], addeds[1:], strict=True):
        states.append(one_decay * states[-1] + one_added)
        products.append(one_decay * products[-1])
    ends = linear_recurrence(products[-1], states[-1], levels - 1)
    blocks = torch.stack(states, 1) + torch.stack(products, 1) * shift(ends, 0.0).unsqueeze(1)
    own = torch.arange(length, device=decay.device)
    return blocks[:, own % _SIDE, own // _SIDE]


def shift(tensor: Tensor, first: float) -> Tensor:
    """Return at each position of dimension 1 what ``tensor`` has at the one before, and ``first`` at the first."""
    index = torch.arange(tensor.shape[1], device=tensor.device)
    return torch.cat([torch.full_like(tensor[:, :1], first), tensor], 1).index_select(1, index)


def _by_pairs(decay: Tensor, added: Tensor) -> Tensor:
    """Return the states as sums of all that was added before, each times the decays since."""
    index = torch.arange(decay.shape[1], device=decay.device).view(-1, *[1] * (decay.ndim - 2))
    is_later = index.unsqueeze(1) > index
    since = torch.where(is_later, decay.unsqueeze(2), 1.0).cumprod(1)
    is_not_before = index.unsqueeze(1) >= index
    return (torch.where(is_not_before, since, 0.0) * added.unsqueeze(1)).sum(2)
