"""Compute the scalings that X-LoRA's classifier gives for the tokens of a call, for programs and generators.

Nothing is written to the caller's cache.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor

from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.causal_generator import CausalGenerator
from adaptc.generation.generator import Generator
from adaptc.program.xlora_scalings import check_scalings, expert_scalings
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore


def xlora_scalings(
    program: ProgramCore | BoundProgram | Generator, *args: Any, adapter_name: str | None = None, **inputs: Any
) -> Tensor:
    """Return the scalings that X-LoRA's classifier gives for the tokens of one call, as PEFT's ``get_latest_scalings``.

    ``program`` is an :class:`AdaptedProgram`, or what ``bind`` returns. Its inputs are those of a call, of which only
    the pass that the classifier reads is computed. Or it is a :class:`Generator`, with the inputs of a step
    (``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values``), whose cache stays as it is.
    ``adapter_name`` says which adapter, where several act.

    Returns (batch, length, layers, experts) for the given tokens, in the adapter's dtype and without a gradient. These
    are the scalings before ``top_k_lora`` and ``global_scaling_weight`` are applied. The layers are the adapted ones,
    in the model's order. Without ``layerwise_scalings`` all layers have the same scalings. Raises ConfigError for a
    program without such an adapter, and AdaptcError for inputs that do not fit.
    """
    if not isinstance(program, Generator):
        return expert_scalings(program, *args, adapter_name=adapter_name, **inputs)
    runner: Any = program.runner
    check_scalings(runner, adapter_name)
    looking = program.shallow_copy()
    assert isinstance(looking, CausalGenerator)  # no model with an encoder has an adapter that reads its first pass
    looking.step = partial(expert_scalings, runner, adapter_name=adapter_name)
    given = {n: copy.copy(inputs.pop(n, None)) for n in ("past_key_values", "cache")}
    before = next((past.length for past in given.values() if isinstance(past, StepCache)), 0)
    found: Tensor = looking.forward(*args, **inputs, **given).logits
    return (
        found[:, before:] if not program.spec.cache_mode.has_cache else found
    )  # a step without a cache computes the whole text
