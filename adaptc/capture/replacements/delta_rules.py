"""Compute the gated delta rule in a fixed number of chunks, whatever the length of a text is.

A state maps keys to values. At each position it decays, and is corrected so that the position's key gives more of the
position's value:

    state = exp(g) * state;  state += beta * outer(key, value - key @ state);  output = query @ state

Transformers computes this by chunks of 64 positions, so that a trace has as many steps as the example has chunks. Here
a chunk is a sixteenth of the text instead. What the positions of a chunk correct follows from a triangular system of
equations, for all chunks at once. The states between chunks then take one step a chunk. So the memory of a call grows
with the square of the length. It is that of a sixteenth of an attention's scores, where decays are numbers of a head.

``g`` is one number a position and head (Qwen), or one for each channel of the keys (Kimi).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import Function, all_arguments

#: the number of chunks
_CHUNKS = 16
#: the number of blocks in a chunk
_BLOCKS = 4


def gated_delta_rule(original: Function) -> Function:
    """Return the gated delta rule of queries, keys and values (batch, length, heads, width)."""
    signature = inspect.signature(original)

    def apply_rule(*args: Any, **kwargs: Any) -> Any:
        given = all_arguments(signature, args, kwargs)
        if given["initial_state"] is not None:
            return original(*args, **kwargs)
        names = ("query", "key", "value", "beta", "g")
        query, key, value, beta, decay = (given[n].float() for n in names)
        if given["use_qk_l2norm_in_kernel"]:
            query, key = _normalized(query), _normalized(key)
        repeats = value.shape[2] // key.shape[2]
        query, key = (t.repeat_interleave(repeats, 2) if repeats > 1 else t for t in (query, key))
        query = query * query.shape[-1] ** -0.5
        out, last = _by_chunks(query, key, value, beta.unsqueeze(-1), decay if decay.ndim == 4 else decay.unsqueeze(-1))
        return out.to(given["query"].dtype), last if given["output_final_state"] else None

    return apply_rule


def _normalized(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)


def _by_chunks(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of queries (batch, length, heads, width), and the last state (batch, heads, key width,
    width)."""
    length, device = query.shape[1], query.device
    # Two positions a block at least: a trace takes a single one for a constant.
    side = _BLOCKS * torch.sym_max((length + _CHUNKS * _BLOCKS - 1) // (_CHUNKS * _BLOCKS), 2)
    places = torch.arange(_CHUNKS, device=device).unsqueeze(1) * side + torch.arange(side, device=device)
    # Positions after the last one have no influence on those before, and none on the state: they correct nothing.
    is_text = (places < length)[..., None, None]
    places = places.clamp(max=length - 1)
    # (batch * heads, chunks, places, width)
    heads = query.shape[2]
    query, key, value, beta, decay = (
        t.movedim(3, 1).flatten(0, 1)
        for t in (
            query[:, places],
            key[:, places],
            value[:, places],
            beta[:, places] * is_text,
            decay[:, places] * is_text,
        )
    )
    since_start = decay.cumsum(2)
    until_end = (since_start[:, :, -1:] - since_start).exp()
    decayed = since_start.exp()

    writing = key * beta
    pairs = _products_by_head if decay.shape[-1] == 1 else _products_by_channel
    system, seen = pairs(writing, key, since_start), pairs(query, key, since_start)
    known = torch.cat([value * beta, writing * decayed], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    own, read = solved.split([value.shape[-1], key.shape[-1]], -1)

    chunks = (t.unbind(1) for t in (own, read, query * decayed, seen, (key * until_end).mT, decayed[:, :, -1:].mT))
    state, outs = key.new_zeros(key.shape[0], key.shape[-1], value.shape[-1]), list[Tensor]()
    for own_values, reading, asking, seeing, keeping, remaining in zip(*chunks, strict=True):
        corrections = torch.baddbmm(own_values, reading, state, alpha=-1)
        outs.append(torch.baddbmm(torch.bmm(asking, state), seeing, corrections))
        state = torch.baddbmm(remaining * state, keeping, corrections)
    out = torch.cat(outs, 1).unflatten(0, (-1, heads)).transpose(1, 2)
    return out.index_select(1, torch.arange(length, device=device)), state.unflatten(0, (-1, heads))


def _is_later(side: Any, device: torch.device) -> Tensor:
    index = torch.arange(side, device=device)
    return index > index.unsqueeze(1)


def _products_by_head(rows: Tensor, keys: Tensor, since_start: Tensor) -> Tensor:
    """Return the products of all ``rows`` with the ``keys`` not after them, decayed by one number a head."""
    decays = (since_start - since_start.mT).masked_fill(_is_later(rows.shape[2], rows.device), -torch.inf).exp()
    return rows @ keys.mT * decays


def _products_by_channel(rows: Tensor, keys: Tensor, since_start: Tensor) -> Tensor:
    """Return the products of all ``rows`` with the ``keys`` not after them, decayed channel by channel.

    Decays of all pairs and channels would take much memory. They are made in blocks alone. Between blocks they are a
    product: a key's decay up to the start of the row's block, and the row's since then. Neither is above 1, as a
    quotient by one of both might be.
    """
    row_blocks, key_blocks, sums = (t.unflatten(2, (_BLOCKS, -1)) for t in (rows, keys, since_start))
    side = row_blocks.shape[3]
    within = sums.unsqueeze(-2) - sums.unsqueeze(-3)
    within = within.masked_fill(_is_later(side, rows.device).unsqueeze(-1), -torch.inf).exp()
    within = (row_blocks.unsqueeze(-2) * key_blocks.unsqueeze(-3) * within).sum(-1)

    starts = torch.cat([torch.zeros_like(sums[..., :1, -1, :]), sums[..., :-1, -1, :]], 2)
    until_start = starts[..., None, None, :] - sums.unsqueeze(2)
    is_not_before = ~_is_later(_BLOCKS, rows.device).mT
    until_start = until_start.masked_fill(is_not_before[..., None, None], -torch.inf).exp()
    later_rows = row_blocks * (sums - starts.unsqueeze(-2)).exp()
    between = later_rows.unsqueeze(3) @ (key_blocks.unsqueeze(2) * until_start).mT

    is_own = torch.eye(_BLOCKS, dtype=rows.dtype, device=rows.device)[..., None, None]
    blocks = between + is_own * within.unsqueeze(3)
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
