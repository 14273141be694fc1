"""What is known of a step program beside its graph, and what this release of transformers calls things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from adaptc.generation.layout import CacheLayout


@dataclass(frozen=True, eq=False)
class Facts:
    """``config``, ``generation_config``: copies of the model's. ``max_batch``, ``max_length``: rows and positions that
    a cache has at most. ``positions``, ``embeds``: whether the step takes position ids, and embeddings. ``vocabulary``,
    ``width``: how many tokens there are, and the size of their embeddings. ``tokenizer``: gives the
    one that came with the program, if one did."""

    config: Any
    generation_config: Any
    layout: CacheLayout
    max_batch: int
    max_length: int
    positions: bool
    embeds: bool
    vocabulary: int
    width: int
    embeds_dtype: torch.dtype
    tokenizer: Callable[[], Any] | None = field(default=None, kw_only=True)


@cache
def past_name() -> str:
    """What this release of transformers calls a cache."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
