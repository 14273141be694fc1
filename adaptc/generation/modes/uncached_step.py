"""Turn a causal model into a step without a cache, which is given the whole text each time.

Inside :func:`captured_uncached_step` the model's ``forward`` takes the inputs of ``step`` without those of a cache, and
as many mask positions as tokens. Between steps a :class:`StepCache` holds token ids and position_ids in the place of
keys and values. So generation continues from it as from any cache and gives the same answers. Each step computes the
whole text again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import keyword_only_parameter, patch_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, LayerLayout
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.static_step import StepExample, example_step

#: the layout of a cache that holds a text: its token ids as keys, its position_ids as values
TEXT_LAYOUT = CacheLayout((LayerLayout(1, 1, 1),), torch.int64)


@contextlib.contextmanager
def captured_uncached_step(model: nn.Module, size_limit: int | None = None) -> Iterator[StepExample]:
    """Run the block with ``model`` as its step without a cache; its own forward is restored afterwards.

    ``size_limit`` bounds the tokens; None for any number. Raises CaptureError for a model whose forward takes no
    attention_mask, because the rows of a batch could not differ in length.
    """
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" not in takes:
        raise CaptureError(f"the forward of {type(model).__name__} takes no attention_mask")
    step = _without_cache_inputs(
        example_step(model, CacheLayout((), torch.float32), "position_ids" in takes, False, size_limit)
    )
    original, takes_logits_to_keep, caches = model.forward, "logits_to_keep" in takes, "use_cache" in takes

    def forward(**inputs: Any) -> Tensor:
        keep = inputs.pop("keep")
        if takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        if caches:
            inputs["use_cache"] = False
        logits = original(**inputs).logits
        return logits if takes_logits_to_keep else logits[:, keep]

    with patch_forward(model, forward, list(map(keyword_only_parameter, step.example_inputs))):
        yield step


def _without_cache_inputs(step: StepExample) -> StepExample:
    """Return ``step`` without ``slots`` and with an attention_mask of as many positions as tokens."""
    inputs, shapes = dict(step.example_inputs), dict(step.dynamic_shapes)
    del inputs["slots"], shapes["slots"]
    inputs["attention_mask"], shapes["attention_mask"] = torch.ones_like(inputs["input_ids"]), shapes["input_ids"]
    return StepExample(inputs, shapes)


def run_uncached(
    step: Callable[..., Any], past: StepCache, inputs: Mapping[str, Tensor], tokens: int, logits_to_keep: int | Tensor
) -> Tensor:
    """Run a step on new tokens and all earlier ones, which ``past`` holds; returns the logits that ``logits_to_keep``
    asks for.

    The arguments are those of :func:`run_chunked`.
    """
    cached_length, total = past.length, past.length + tokens
    ids, positions = (t[:, 0, :, 0] for t in past.tensors)
    past.begin_write(total)
    ids[:, cached_length:total] = inputs["input_ids"]
    given = {n: t for n, t in inputs.items() if t.ndim == 1} | {"input_ids": ids[:, :total].contiguous()}
    if "position_ids" in inputs:
        positions[:, cached_length:total] = inputs["position_ids"]
        given["position_ids"] = positions[:, :total].contiguous()
    if isinstance(logits_to_keep, int):
        logits_to_keep = torch.arange(max(tokens - logits_to_keep, 0) if logits_to_keep else 0, tokens)
    mask, kept = past.mask[:, :total].contiguous(), logits_to_keep.to(past.device) + cached_length
    logits = step(**given, attention_mask=mask, keep=kept)
    past.end_write(total)
    return logits
