"""Turn a causal model into a step without a cache, which is given the whole text each time.

Inside :func:`stepping_whole` the model's ``forward`` takes the inputs of ``step`` without those of a cache, and as many
mask positions as tokens. Between steps a :class:`StepCache` holds token ids and position_ids in the place of keys and
values. So generation continues from it as from any cache and gives the same answers. Each step computes the whole text
again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import keyword, replaced_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, LayerLayout
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.static_step import Step, example_step

#: the layout of a cache that holds a text: its token ids as keys, its position_ids as values
TEXT = CacheLayout((LayerLayout(1, 1, 1),), torch.int64)


@contextlib.contextmanager
def stepping_whole(model: nn.Module, most: int | None = None) -> Iterator[Step]:
    """Run the block with ``model`` as its step without a cache; its own forward is restored afterwards.

    ``most`` bounds the tokens; None for any number. Raises CaptureError for a model whose forward takes no
    attention_mask, because the rows of a batch could not differ in length.
    """
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
    """Return ``step`` without ``slots`` and with an attention_mask of as many positions as tokens."""
    inputs, shapes = dict(step.example_inputs), dict(step.dynamic_shapes)
    del inputs["slots"], shapes["slots"]
    inputs["attention_mask"], shapes["attention_mask"] = torch.ones_like(inputs["input_ids"]), shapes["input_ids"]
    return Step(inputs, shapes)


def run_whole(
    step: Callable[..., Any], past: StepCache, inputs: Mapping[str, Tensor], tokens: int, keep: int | Tensor
) -> Tensor:
    """Run a step on new tokens and all earlier ones, which ``past`` holds; returns the logits that ``keep`` asks for.

    The arguments are those of :func:`pieces.run`.
    """
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
