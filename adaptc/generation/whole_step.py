"""The step of a model that is captured without a cache: each is given the whole text.

Before: a causal transformers model. After, inside :func:`stepping_whole`: the same module, whose ``forward`` takes
plain tensors alone: those of ``step`` without a cache, and as many positions as tokens. Between steps a cache of tokens
and positions stands in for one of keys and values, so whatever goes on from a cache goes on from it: the same answers,
and all of the text computed again for each.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.replaced_forward import keyword, replaced_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache import StepCache
from adaptc.generation.layout import CacheLayout, LayerLayout
from adaptc.generation.step import Step, example_step

#: of a cache that holds the text: as keys its tokens, as values their positions
TEXT = CacheLayout((LayerLayout(1, 1, 1),), torch.int64)


@contextlib.contextmanager
def stepping_whole(model: nn.Module, most: int | None = None) -> Iterator[Step]:
    """``model`` as its step; as it was afterwards. ``most``: tokens at most, None for any. Raises CaptureError for a
    model whose forward takes no mask, so that rows of a batch could not differ in length."""
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" not in takes:
        raise CaptureError(f"the forward of {type(model).__name__} takes no attention_mask")
    step = _whole(example_step(model, CacheLayout((), torch.float32), "position_ids" in takes, False, most))
    original, keeps, caches = model.forward, "logits_to_keep" in takes, "use_cache" in takes

    def forward(**inputs: Any) -> Tensor:
        keep = inputs.pop("keep")
        if keeps:
            inputs["logits_to_keep"] = keep
        if caches:
            inputs["use_cache"] = False
        logits = original(**inputs).logits
        return logits if keeps else logits[:, keep]

    with replaced_forward(model, forward, list(map(keyword, step.example_inputs))):
        yield step


def _whole(step: Step) -> Step:
    """With a mask of as many positions as there are tokens."""
    inputs, shapes = dict(step.example_inputs), dict(step.dynamic_shapes)
    del inputs["slots"], shapes["slots"]
    inputs["attention_mask"], shapes["attention_mask"] = torch.ones_like(inputs["input_ids"]), shapes["input_ids"]
    return Step(inputs, shapes)


def run_whole(
    step: Callable[..., Any], past: StepCache, inputs: Mapping[str, Tensor], tokens: int, keep: int | Tensor
) -> Tensor:
    """As ``pieces.run``, of a cache that holds the text."""
    before, total = past.length, past.length + tokens
    ids, positions = (t[:, 0, :, 0] for t in past.tensors)
    past.writes(total)
    ids[:, before:total] = inputs["input_ids"]
    given = {n: t for n, t in inputs.items() if t.ndim == 1} | {"input_ids": ids[:, :total].contiguous()}
    if "position_ids" in inputs:
        positions[:, before:total] = inputs["position_ids"]
        given["position_ids"] = positions[:, :total].contiguous()
    if isinstance(keep, int):
        keep = torch.arange(max(tokens - keep, 0) if keep else 0, tokens)
    mask, kept = past.mask[:, :total].contiguous(), keep.to(past.device) + before
    logits = step(**given, attention_mask=mask, keep=kept)
    past.wrote(total)
    return logits
