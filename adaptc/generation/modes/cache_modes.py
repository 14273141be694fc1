"""Capture and call a step in the way that fits what it keeps of earlier tokens (``spec.KEEPS``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.generation.cache.cache_layout import CacheLayout, StateLayout
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.step_cache import StepCache, cache_class
from adaptc.generation.cache.token_gates import refuse_acting
from adaptc.generation.modes.chunked_prefill import run
from adaptc.generation.modes.recurrent_step import run_states, state_cache_class, stepping_states
from adaptc.generation.modes.static_step import Step, stepping
from adaptc.generation.modes.uncached_step import TEXT, run_whole, stepping_whole
from adaptc.generation.spec import EXACT, NOTHING, STATE, WINDOW, GenerationSpec


def stepping_as(
    model: nn.Module, keeps: str, layout: CacheLayout, most: int | None = None, acts: Sequence[str] = ()
) -> AbstractContextManager[Step]:
    """Return a context in which ``model`` has the forward of its step; see :func:`stepping`.

    Raises ConfigError for ``acts`` where the step has no cache of keys and values.
    """
    if keeps == NOTHING:
        refuse_acting(acts, f"{type(model).__name__} would generate without a cache")
        return stepping_whole(model, most)
    if isinstance(layout, StateLayout):
        refuse_acting(acts, f"{type(model).__name__} would generate from a state")
        return stepping_states(model, layout)
    return stepping(model, layout, most, keeps == WINDOW, acts)


def run_as(
    facts: GenerationSpec,
    step: Callable[..., Any],
    past: StepCache,
    inputs: Mapping[str, Tensor],
    tokens: int,
    keep: int | Tensor,
) -> Tensor:
    """Return the logits of new tokens and write these into the cache; see :func:`chunked_prefill.run`."""
    if facts.keeps == NOTHING:
        return run_whole(step, past, inputs, tokens, keep)
    if facts.keeps == STATE:
        return run_states(step, past, inputs, tokens, keep)
    return run(step, past, inputs, tokens, keep, facts.keeps == EXACT)


def cache_for(facts: GenerationSpec, device: torch.device, front: CachePrefix | None = None) -> StepCache:
    """Return a cache that holds nothing but ``front``."""
    layout = TEXT if facts.keeps == NOTHING else facts.layout
    made = state_cache_class() if facts.keeps == STATE else cache_class()
    new = made(layout, facts, facts.max_length, device, facts.window)
    if front is not None:
        new.begin(front)
    return new
