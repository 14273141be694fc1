"""Compute a recurrence over positions in a fixed number of steps, whatever its length is.

A recurrence such as ``state[t] = decay[t] * state[t - 1] + added[t]`` joins positions by an operation that is
associative: what some positions do together is an element like that of one. So each step can double the number of
positions that an element stands for. First this is done within blocks, then for whole blocks, and then each position is
joined with all blocks before its own. Blocks make the later steps cheap, of which there are many.

A trace of this takes any length. Where sizes depend on the length, elements are moved by index, about which torch adds
no guards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Elements = tuple[Tensor, ...]
Join = Callable[[Elements, Elements], Elements]

#: the number of positions in a block, as a power of two
_BLOCK = 4
#: how often the number of blocks doubles that an element stands for: all lengths below 2**31 are right
_DOUBLINGS = 27


def scan(join: Join, elements: Elements, neutral: tuple[float, ...], *, exclusive: bool = False) -> Elements:
    """Return for each position what it and all positions before it are together; without itself if ``exclusive``.

    ``elements`` are tensors (batch, length, ...). ``join`` takes elements and those right after them; it is associative
    and elementwise. ``neutral`` are the numbers that change nothing in a join.
    """
    length, side, device = elements[0].shape[1], 2**_BLOCK, elements[0].device
    # Two blocks at least: a trace takes a single one for a constant.
    count = length // side + 2
    places = torch.arange(side, device=device).unsqueeze(1) + side * torch.arange(count, device=device)
    # Places after the last position have no influence on those before.
    places = places.flatten().clamp(max=length - 1)
    blocks = tuple(e.index_select(1, places).unflatten(1, (side, count)) for e in elements)
    blocks = _join_all_before(join, blocks, neutral, _BLOCK)
    before = _join_all_before(join, tuple(b[:, -1] for b in blocks), neutral, _DOUBLINGS)
    own = torch.arange(length, device=device)
    block, place = own // side, own % side + (0 if exclusive else 1)
    before = tuple(e.index_select(1, block) for e in before)
    return join(before, tuple(b.flatten(1, 2).index_select(1, place * count + block) for b in blocks))


def _join_all_before(join: Join, elements: Elements, neutral: tuple[float, ...], doublings: int) -> Elements:
    """Return for each index of dimension 1, and for one more, the elements of all indices before it together."""
    sizes = zip(elements, neutral, strict=True)
    elements = tuple(torch.cat([torch.full_like(e[:, :1], n), e], 1) for e, n in sizes)
    powers = torch.arange(doublings, device=elements[0].device)
    distances = (torch.ones_like(powers) << powers).unsqueeze(1)
    # The first elements are neutral: so is what lies before them.
    sources = (torch.arange(elements[0].shape[1], device=powers.device) - distances).clamp(min=0)
    for source in sources.unbind():
        elements = join(tuple(e.index_select(1, source) for e in elements), elements)
    return elements


def linear_recurrence(decay: Tensor, added: Tensor) -> Tensor:
    """Return ``state[:, t] = decay[:, t] * state[:, t - 1] + added[:, t]``, which starts with zeros."""

    def join(before: Elements, after: Elements) -> Elements:
        return before[0] * after[0], after[0] * before[1] + after[1]

    return scan(join, (decay, added), (1.0, 0.0))[1]
