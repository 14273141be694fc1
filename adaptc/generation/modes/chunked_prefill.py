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
from adaptc.generation.modes.static_step import LAST_KEYS

#: the tokens of a chunk: enough for matmuls to run at full speed
CHUNK_SIZE = 512


def run_chunked(
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    tokens: int,
    logits_to_keep: int | Tensor,
    cache_ends_with_step: bool = False,
) -> Tensor:
    """Run a step on ``tokens`` new tokens and write them to ``past``; returns the logits (batch, kept, vocabulary).

    ``inputs`` are tensors with the tokens along axis 1, or with fewer than two axes. ``logits_to_keep`` is the number
    of last tokens whose logits are wanted, 0 for all, or a tensor of token indices. ``cache_ends_with_step`` says that
    the step takes a cache that ends with its tokens.
    """
    cached_length = past.length
    # Tokens that attend to later ones need all of them at once.
    is_whole = tokens <= CHUNK_SIZE or LAST_KEYS in inputs
    if is_whole or not isinstance(logits_to_keep, int) or not 0 < logits_to_keep <= CHUNK_SIZE:
        logit_indices = last_token_indices(logits_to_keep, tokens, past.device)
        return _call_step(
            step,
            past,
            inputs,
            (cached_length, cached_length + tokens),
            cached_length + tokens if cache_ends_with_step else past.allocated_length,
            logit_indices,
        )
    # The last chunk is full, so that it has all tokens whose logits are wanted. The first chunk takes the remainder.
    starts = [0, *range(tokens % CHUNK_SIZE or CHUNK_SIZE, tokens, CHUNK_SIZE)]
    logits = None
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        part = {n: v[:, start:end] if v.ndim > 1 else v for n, v in inputs.items()}
        logit_indices = last_token_indices(logits_to_keep if end == tokens else 1, end - start, past.device)
        logits = _call_step(
            step, past, part, (cached_length + start, cached_length + end), cached_length + end, logit_indices
        )
    assert logits is not None
    return logits


def last_token_indices(logits_to_keep: int | Tensor, tokens: int, device: torch.device) -> Tensor:
    """Return the indices (kept,) of the last ``logits_to_keep`` of ``tokens`` tokens, 0 for all; a tensor as it is."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep.to(device)
    return torch.arange(max(tokens - logits_to_keep, 0) if logits_to_keep else 0, tokens, device=device)


def _call_step(
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    span: tuple[int, int],
    visible_length: int,
    logit_indices: Tensor,
) -> Tensor:
    past.resize_rings(span[1] - span[0])
    mask, tensors = past.mask, past.tensors
    if visible_length < past.allocated_length:
        mask, tensors = mask[:, :visible_length], past.view_up_to(visible_length)
    slots = torch.arange(*span, device=past.device)
    past.begin_write(span[1])
    logits = step(
        **inputs,
        attention_mask=mask,
        slots=slots,
        keep=logit_indices,
        **dict(zip(past.layout.names, tensors, strict=True)),
    )
    past.end_write(span[1])
    return logits
