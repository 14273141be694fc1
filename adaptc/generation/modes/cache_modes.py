"""Capture and call a step in the way that fits what it keeps of earlier tokens (``spec.CACHE_MODES``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.generation.cache.cache_layout import CacheLayout, StateLayout
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.step_cache import StepCache, cache_class
from adaptc.generation.cache.token_gates import refuse_token_gates
from adaptc.generation.modes.chunked_prefill import run_chunked
from adaptc.generation.modes.recurrent_step import captured_as_state_step, run_token_by_token, state_cache_class
from adaptc.generation.modes.static_step import StepExample, captured_as_step
from adaptc.generation.modes.uncached_step import TEXT_LAYOUT, captured_uncached_step, run_uncached
from adaptc.generation.spec import EXACT_LENGTH, RECURRENT, SLIDING_WINDOW, UNCACHED, GenerationSpec


def captured_in_mode(
    model: nn.Module,
    cache_mode: str,
    layout: CacheLayout,
    size_limit: int | None = None,
    token_gate_inputs: Sequence[str] = (),
) -> AbstractContextManager[StepExample]:
    """Return a context in which ``model`` has the forward of its step; see :func:`captured_as_step`.

    Raises ConfigError for ``token_gate_inputs`` where the step has no cache of keys and values.
    """
    if cache_mode == UNCACHED:
        refuse_token_gates(token_gate_inputs, f"{type(model).__name__} would generate without a cache")
        return captured_uncached_step(model, size_limit)
    if isinstance(layout, StateLayout):
        refuse_token_gates(token_gate_inputs, f"{type(model).__name__} would generate from a state")
        return captured_as_state_step(model, layout)
    return captured_as_step(model, layout, size_limit, cache_mode == SLIDING_WINDOW, token_gate_inputs)


def run_in_mode(
    spec: GenerationSpec,
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    tokens: int,
    logits_to_keep: int | Tensor,
) -> Tensor:
    """Return the logits of new tokens and write these into the cache; see :func:`run_chunked`."""
    if spec.cache_mode == UNCACHED:
        return run_uncached(step, past, inputs, tokens, logits_to_keep)
    if spec.cache_mode == RECURRENT:
        return run_token_by_token(step, past, inputs, tokens, logits_to_keep)
    return run_chunked(step, past, inputs, tokens, logits_to_keep, spec.cache_mode == EXACT_LENGTH)


def make_cache(spec: GenerationSpec, device: torch.device, prefix: CachePrefix | None = None) -> StepCache:
    """Return a cache that holds nothing but ``prefix``."""
    layout = TEXT_LAYOUT if spec.cache_mode == UNCACHED else spec.layout
    made = state_cache_class() if spec.cache_mode == RECURRENT else cache_class()
    new = made(layout, spec, spec.max_length, device, spec.sliding_window)
    if prefix is not None:
        new.start_with_prefix(prefix)
    return new
