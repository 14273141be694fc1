"""Keep no cache: a step is given the whole text each time.

Inside :meth:`UncachedMode.capture` the model's ``forward`` takes the inputs of ``step`` without those of a cache, and
as many mask positions as tokens. Between steps a :class:`StepCache` holds token ids and position_ids in the place of
keys and values. So generation continues from it as from any cache and gives the same answers. Each step computes the
whole text again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import patch_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, LayerLayout
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import refuse_token_gates
from adaptc.generation.modes.cache_mode import CacheMode, Inputs, StepFunction
from adaptc.generation.modes.chunked_prefill import last_token_indices
from adaptc.generation.modes.static_step import StepExample, StepSpec, example_step
from adaptc.generation.modes.step_draw import StepDraw

#: the layout of a cache that holds a text: its token ids as keys, its position_ids as values
TEXT_LAYOUT = CacheLayout((LayerLayout(1, 1, 1),), torch.int64)


class UncachedMode(CacheMode):
    """The mode of a step that computes the whole text for each token."""

    name = "nothing"
    step_name = "a step without a cache"
    text_manner = "of other lengths"
    has_cache = False
    takes_slots = False

    @contextlib.contextmanager
    def capture(
        self,
        model: nn.Module,
        layout: CacheLayout,
        size_limit: int | None = None,
        token_gate_inputs: Sequence[str] = (),
    ) -> Generator[StepExample]:
        """Return a context as :meth:`CacheMode.capture` does.

        Raises CaptureError for a model whose forward takes no attention_mask, because the rows of a batch could not
        differ in length.
        """
        refuse_token_gates(token_gate_inputs, f"{type(model).__name__} would generate without a cache")
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

        with patch_forward(model, forward, step.parameters):
            yield step

    def check_inputs(
        self, spec: StepSpec, ids: Tensor, mask: Tensor, positions: Tensor, *, is_whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        given = {"position_ids": positions} if spec.takes_position_ids else {}
        keep = torch.arange(ids.shape[1], device=ids.device)
        yield {"input_ids": ids, "attention_mask": mask, **given, "keep": keep}

    def run(
        self, step: StepFunction, past: StepCache, inputs: Inputs, tokens: int, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Run ``step`` on the new tokens and all earlier ones, which ``past`` holds."""
        cached_length, total = past.length, past.length + tokens
        ids, positions = (t[:, 0, :, 0] for t in past.tensors)
        past.begin_write(total)
        ids[:, cached_length:total] = inputs["input_ids"]
        given = {n: t for n, t in inputs.items() if t.ndim == 1} | {"input_ids": ids[:, :total].contiguous()}
        if "position_ids" in inputs:
            positions[:, cached_length:total] = inputs["position_ids"]
            given["position_ids"] = positions[:, :total].contiguous()
        mask = past.mask[:, :total].contiguous()
        keep = last_token_indices(logits_to_keep, tokens, past.device) + cached_length
        logits = step(**given, attention_mask=mask, keep=keep)
        past.end_write(total)
        return logits

    def cache_layout(self, spec: StepSpec) -> CacheLayout:
        return TEXT_LAYOUT

    def describe(self, spec: StepSpec) -> list[str]:
        return [f"no cache, so each token computes the whole text: {spec.mode_reason}"]

    def draw_span(self, draw: StepDraw, length: int) -> tuple[int, int]:
        return draw.size(0, 0), length


def _without_cache_inputs(step: StepExample) -> StepExample:
    """Return ``step`` without ``slots`` and with an attention_mask of as many positions as tokens."""
    inputs, shapes = dict(step.example_inputs), dict(step.dynamic_shapes)
    del inputs["slots"], shapes["slots"]
    inputs["attention_mask"], shapes["attention_mask"] = torch.ones_like(inputs["input_ids"]), shapes["input_ids"]
    return StepExample(inputs, shapes)
