"""Compute a linear recurrence over positions in a fixed number of steps, whatever its length is.

``state[t] = decay[t] * state[t - 1] + added[t]`` goes on through a block of positions in as many steps as a block has,
for all blocks at once. What a block does as a whole is one such step. So the states before blocks follow from a
recurrence over blocks, and these from one over blocks of blocks. That last one is short. It is computed for all pairs,
which takes few operations, and little memory below some ten thousand positions.

A trace of this takes any length. Positions are the first dimension, and all others are one, since compilers take long
for strides that depend on the length. Elements are moved by index, about which torch adds no guards.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: the number of positions in a block
_SIDE = 8
#: how often blocks are made
_LEVELS = 2


def linear_recurrence(decay: Tensor, added: Tensor) -> Tensor:
    """Return ``state[:, t] = decay[:, t] * state[:, t - 1] + added[:, t]``, which starts with zeros.

    All are (batch, length, ...).
    """
    length = decay.shape[1]
    # Two blocks of blocks at least: a trace takes a single one for a constant.
    count = length // _SIDE**_LEVELS + 2
    # Indices of as many dimensions as there are levels: where torch divides one into blocks it adds a guard, which it
    # cannot prove for every range of lengths.
    index = torch.arange(count, device=decay.device)
    for _ in range(_LEVELS):
        index = index.unsqueeze(-1) * _SIDE + torch.arange(_SIDE, device=decay.device)
    # Positions after the last one have no influence on those before.
    index = index.clamp(max=length - 1)
    before = _states_before(*(t.transpose(0, 1).flatten(1)[index] for t in (decay, added)))
    before = before.flatten(0, -2).index_select(0, torch.arange(length, device=decay.device))
    return decay * before.unflatten(1, (-1, *decay.shape[2:])).transpose(0, 1) + added


def shift(tensor: Tensor, first: float, dim: int = 1) -> Tensor:
    """Return at each position of dimension ``dim`` what ``tensor`` has at the one before, and ``first`` at the
    first."""
    index = torch.arange(tensor.shape[dim], device=tensor.device)
    return torch.cat([torch.full_like(tensor.narrow(dim, 0, 1), first), tensor], dim).index_select(dim, index)


def _states_before(decay: Tensor, added: Tensor) -> Tensor:
    """Return the state before each position, where positions are all dimensions but the last, the slowest one first."""
    if decay.ndim == 2:
        return shift(_by_pairs(decay, added), 0.0, 0)
    steps = list(zip(decay.unbind(-2), added.unbind(-2), strict=True))
    product, end = steps[0]
    for one_decay, one_added in steps[1:]:
        product, end = one_decay * product, one_decay * end + one_added
    states = [_states_before(product, end)]
    for one_decay, one_added in steps[:-1]:
        states.append(one_decay * states[-1] + one_added)
    return torch.stack(states, -2)


def _by_pairs(decay: Tensor, added: Tensor) -> Tensor:
    """Return the states of (length, width) as sums of all that was added before, each times the decays since."""
    index = torch.arange(decay.shape[0], device=decay.device).unsqueeze(1)
    since = torch.where(index.unsqueeze(1) > index, decay.unsqueeze(1), 1.0).cumprod(0)
    return (torch.where(index.unsqueeze(1) >= index, since, 0.0) * added).sum(1)
