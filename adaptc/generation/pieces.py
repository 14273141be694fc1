"""A call of a step program on a cache; long prompts go through it in pieces.

Before: tokens for the positions after those that are filled, and a cache with room for them. After: their keys and
values are in the cache; the result is the logits of the tokens that were asked for.

A step masks what may not be seen, and computes it nevertheless. In pieces, each of which sees the positions up to its
end alone, a long prompt needs little more than half of the attention. (Compiled code takes whole tensors, so a part of
a cache is copied for it, and back, which is little beside that.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.generation.cache import StepCache

#: tokens of a piece: enough for products to be as fast as they get
PIECE = 512


def run(
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    tokens: int,
    keep: int | Tensor,
    exact: bool = False,
) -> Tensor:
    """``inputs``: those that have a value for each of the ``tokens``, which stand along axis 1, and those that have no
    such axis. ``keep``: of how many of the last tokens logits are wanted, 0 for all, or of which. ``exact``: the step
    is for caches that end with its tokens."""
    before = past.length
    if not isinstance(keep, int) or not 0 < keep <= PIECE or tokens <= PIECE:
        index = _last(keep, tokens, past.device) if isinstance(keep, int) else keep.to(past.device)
        return _call(step, past, inputs, (before, before + tokens), before + tokens if exact else past.room, index)
    # The last piece is the one with the logits, and so the largest; those before it are as many as are needed.
    starts = [0, *range(tokens % PIECE or PIECE, tokens, PIECE)]
    logits = None
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        part = {n: v[:, start:end] if v.ndim > 1 else v for n, v in inputs.items()}
        index = _last(keep if end == tokens else 1, end - start, past.device)
        logits = _call(step, past, part, (before + start, before + end), before + end, index)
    assert logits is not None
    return logits


def _last(keep: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(max(tokens - keep, 0) if keep else 0, tokens, device=device)


def _call(
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    where: tuple[int, int],
    visible: int,
    keep: Tensor,
) -> Tensor:
    past.fit(where[1] - where[0])
    mask, tensors = past.mask, past.tensors
    if visible < past.room:
        mask, tensors = mask[:, :visible], past.seen(visible)
    slots = torch.arange(*where, device=past.device)
    past.writes(where[1])
    logits = step(
        **inputs, attention_mask=mask, slots=slots, keep=keep, **dict(zip(past.layout.names, tensors, strict=True))
    )
    past.wrote(where[1])
    return logits
