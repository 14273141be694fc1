"""What X-LoRA's classifier says of the tokens of a call, of programs and of what generates with one.

Before: a program, or a generator, and the inputs of one of its calls. After: the scalings, and nothing was written to
the caller's cache.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor

from adaptc.generation.cache import StepCache
from adaptc.generation.facts import NOTHING
from adaptc.generation.generator import Generator
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.program.scalings import check_scalings, scalings_of


def xlora_scalings(
    program: ProgramCore | Bound | Generator, *args: Any, adapter_name: str | None = None, **inputs: Any
) -> Tensor:
    """What X-LoRA's classifier says of the tokens of one call, as PEFT's ``get_latest_scalings``.

    ``program``: an :class:`AdaptedProgram`, or what ``bind`` gives; the inputs are those of a call, which is not made:
    nothing but the pass that the classifier reads is computed. Or a :class:`Generator`, with the inputs of a step
    (``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values``), whose cache stays as it is.
    ``adapter_name``: of which adapter, where several act.

    Returns (batch, length, layers, experts) of the tokens that are given, in the dtype of the adapter and without a
    gradient: before ``top_k_lora`` chooses, and before ``global_scaling_weight``. Layers are those that are adapted, in
    the order of the model's; without ``layerwise_scalings`` all of them have the same. Raises ConfigError for a program
    without such an adapter, and AdaptcError for inputs that do not fit.
    """
    if not isinstance(program, Generator):
        return scalings_of(program, *args, adapter_name=adapter_name, **inputs)
    check_scalings(program.runs, adapter_name)
    looking = program.twin()
    looking.step = partial(scalings_of, program.runs, adapter_name=adapter_name)
    given = {n: copy.copy(inputs.pop(n, None)) for n in ("past_key_values", "cache")}
    before = next((past.length for past in given.values() if isinstance(past, StepCache)), 0)
    found: Tensor = looking.forward(*args, **inputs, **given).logits
    return found[:, before:] if program.facts.keeps == NOTHING else found  # which computes the whole text
