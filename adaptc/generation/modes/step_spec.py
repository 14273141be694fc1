"""Hold the facts of a step program that its cache mode needs, to make a cache, to draw inputs and to call it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptc.generation.cache.cache_layout import CacheLayout


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSpec:
    """The sizes of a step program, and the inputs that it takes.

    ``layout`` is that of its cache. ``max_batch`` and ``max_length`` are the most rows and positions that a cache may
    have. ``takes_position_ids`` and ``takes_inputs_embeds`` say whether the step takes position_ids, and inputs_embeds.
    ``vocab_size`` is the number of tokens, ``hidden_size`` the size of their embeddings, ``embeds_dtype`` their dtype.
    ``mode_reason`` says why a better cache mode failed for the model; '' where none did.
    """

    layout: CacheLayout
    max_batch: int
    max_length: int
    takes_position_ids: bool
    takes_inputs_embeds: bool
    vocab_size: int
    hidden_size: int
    embeds_dtype: torch.dtype
    mode_reason: str = ""
    #: the token coefficients that a step takes, with a value for each of its tokens (see ``token_gates``)
    token_gate_inputs: tuple[str, ...] = ()
