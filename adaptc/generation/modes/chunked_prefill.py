"""Call a step program on a cache, with chunked prefill for long prompts.

New tokens follow the filled positions of a cache that has room for them. Their keys and values are written to the
cache, and the logits of the wanted tokens are returned.

A step also computes the attention to positions that its mask hides. In chunked prefill each chunk sees only the
positions up to its own end. So a long prompt needs little more than half of the attention. Compiled code takes whole
tensors, so a cut cache is copied for it and back, which costs little beside the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.generation.cache.step_cache import StepCache

#: the tokens of a chunk: enough for matmuls to run at full speed
PIECE = 512


def run(
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    tokens: int,
    keep: int | Tensor,
    exact: bool = False,
) -> Tensor:
    """Run a step on ``tokens`` new tokens and write them to ``past``; returns the logits (batch, kept, vocabulary).

    ``inputs`` are tensors with the tokens along axis 1, or with fewer than two axes. ``keep`` is the number of last
    tokens whose logits are wanted, 0 for all, or a tensor of token indices. ``exact`` says that the step takes a cache
    that ends with its tokens.
    """
    before = past.length
    if not isinstance(keep, int) or not 0 < keep <= PIECE or tokens <= PIECE:
        index = _last(keep, tokens, past.device) if isinstance(keep, int) else keep.to(past.device)
        return _call(step, past, inputs, (before, before + tokens), before + tokens if exact else past.room, index)
    # The last chunk is full, so that it has all tokens whose logits are wanted. The first chunk takes the remainder.
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
