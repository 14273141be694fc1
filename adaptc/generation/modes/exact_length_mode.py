"""Keep all positions, and show a step only those up to its own end.

It fits models whose masks follow from the size of the cache: free positions behind the step's tokens would count for
text. Each call therefore cuts the cache's tensors, which the static mode hands over whole.
"""

from __future__ import annotations

from adaptc.generation.modes.static_mode import StaticMode
from adaptc.generation.modes.static_step import StepSpec
from adaptc.generation.modes.step_draw import StepDraw


class ExactLengthMode(StaticMode):
    """The mode of a cache that ends with the step's tokens."""

    name = "exact"
    step_name = "a step with a cache that ends with it"
    text_manner = "with a cache in pieces"
    cache_ends_with_step = True

    def draw_span(self, draw: StepDraw, length: int) -> tuple[int, int]:
        tokens = draw.size(1, min(length, draw.max_size))
        return length - tokens, tokens

    def _describe_reason(self, spec: StepSpec) -> str:
        return f", of which a step sees those up to its end alone: {spec.mode_reason}"
