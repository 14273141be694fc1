"""Keep the keys and values of all positions, in a cache with room for more; masks hide the free positions.

It fits every model whose layers keep keys and values and whose masks do not follow from the size of the cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import patch_forward
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.sliding_window import ring_masks
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.cache_mode import CacheMode, Inputs, StepFunction
from adaptc.generation.modes.chunked_prefill import run_chunked
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import (
    StepExample,
    StepSpec,
    cache_over_tensors,
    equate_sizes,
    example_step,
    find_cache_argument,
    replaced_embeddings,
    token_inputs,
)
from adaptc.tables import format_bytes


class StaticMode(CacheMode):
    """The mode of a cache that keeps all positions of every layer."""

    name = "room"
    step_name = "a step with its cache"
    text_manner = "with a cache of fixed room"
    #: whether a step takes a cache that ends with its tokens
    cache_ends_with_step: ClassVar[bool] = False
    #: whether sliding-window layers keep only their window
    uses_rings: ClassVar[bool] = False

    @contextlib.contextmanager
    def capture(
        self,
        model: nn.Module,
        layout: CacheLayout,
        size_limit: int | None = None,
        token_gate_inputs: Sequence[str] = (),
    ) -> Generator[StepExample]:
        cache_argument, parameters = find_cache_argument(model), inspect.signature(model.forward).parameters
        with_positions, with_embeds = "position_ids" in parameters, "inputs_embeds" in parameters
        step = example_step(model, layout, with_positions, with_embeds, size_limit, self.uses_rings)
        for name in token_gate_inputs:
            step.example_inputs[name] = torch.zeros_like(step.example_inputs["input_ids"], dtype=torch.bool)
            step.dynamic_shapes[name] = step.dynamic_shapes["input_ids"]
        original, takes_logits_to_keep, names = model.forward, "logits_to_keep" in parameters, layout.names

        def forward(**inputs: Any) -> Tensor:
            equate_sizes(inputs, step.dynamic_shapes)
            slots, keep = inputs.pop("slots"), inputs.pop("keep")
            tensors = [inputs.pop(n) for n in names]
            given = inputs.pop("inputs_embeds", None), inputs.pop("embedded", None)
            for name in token_gate_inputs:
                del inputs[name]
            if takes_logits_to_keep:
                inputs["logits_to_keep"] = keep
            inputs[cache_argument] = cache_over_tensors(tensors, slots, layout, self.uses_rings)
            with replaced_embeddings(model, *given):
                logits = original(**inputs, use_cache=True).logits
            return logits if takes_logits_to_keep else logits[:, keep]

        masks = ring_masks() if self.uses_rings else contextlib.nullcontext()
        with patch_forward(model, forward, step.parameters), masks, packed_attention():
            yield step

    def check_inputs(
        self, spec: StepSpec, ids: Tensor, mask: Tensor, positions: Tensor, *, is_whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield three chunks: several tokens, one, and the rest; or the text in one."""
        (rows, length), device = ids.shape, ids.device
        room, window = length + 3, self.ring_window(spec.layout)
        # The ring is as small as the largest chunk allows, so that positions in it are overwritten.
        ring = None if window is None else min(room, window + length // 2)
        cache = spec.layout.zeros(rows, device, room, ring)
        wide = torch.cat([mask, mask.new_ones(rows, room - length)], 1)
        for start, end in pairwise((0, length) if is_whole else (0, length // 2, length // 2 + 1, length)):
            seen, tokens = end if self.cache_ends_with_step else room, end - start
            inputs = token_inputs(spec, device, ids[:, start:end], None, rows, tokens)
            inputs |= {"attention_mask": wide[:, :seen], **{n: t[:, :, :seen] for n, t in cache.items()}}
            if spec.takes_position_ids:
                inputs["position_ids"] = spec.step_positions(positions[..., start:end])
            inputs |= {n: torch.zeros_like(inputs["input_ids"], dtype=torch.bool) for n in spec.token_gate_inputs}
            slots, keep = torch.arange(start, end, device=device), torch.arange(tokens, device=device)
            yield {**inputs, "slots": slots, "keep": keep}

    def run(
        self, step: StepFunction, past: StepCache, inputs: Inputs, tokens: int, logits_to_keep: int | Tensor
    ) -> Tensor:
        return run_chunked(step, past, inputs, tokens, logits_to_keep, self.cache_ends_with_step)

    def describe(self, spec: StepSpec) -> list[str]:
        return [self._describe_cache(spec) + self._describe_reason(spec)]

    def _describe_cache(self, spec: StepSpec) -> str:
        """Return the part of the report's line that gives the cache's size."""
        layout, window = spec.layout, self.ring_window(spec.layout)
        passes = f" in {layout.passes} passes" if layout.passes > 1 else ""
        each = format_bytes(layout.nbytes(1, 1, None if window is None else 0))
        return f"cache: {len(layout.layers)} layers{passes}, {each} for each row and position"

    def _describe_reason(self, spec: StepSpec) -> str:
        """Return the part of the report's line that says why the mode is no better."""
        return f", those that look back on a window among them: {spec.mode_reason}" if spec.mode_reason else ""
