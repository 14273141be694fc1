"""Keep all positions in layers with full attention, and only the window in layers with a sliding window.

The tensors of sliding-window layers are rings (see ``sliding_window``). It fits models whose sliding windows are all of
one size, and it is tried before the static mode, because it needs less memory.
"""

from __future__ import annotations

from collections.abc import Collection

from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.modes.static_mode import StaticMode
from adaptc.generation.modes.static_step import StepSpec
from adaptc.tables import format_bytes


class SlidingWindowMode(StaticMode):
    """The mode of a cache whose sliding-window layers keep only their window."""

    name = "window"
    step_name = "a step with rings"
    text_manner = "with rings"
    uses_rings = True

    def ring_window(self, layout: CacheLayout) -> int | None:
        return layout.sliding_window

    def misfit(self, layout: CacheLayout, inputs: Collection[str]) -> str:
        if layout.sliding_window is None:
            return "its layers keep a window, and it has none"
        return super().misfit(layout, inputs)

    def _describe_reason(self, spec: StepSpec) -> str:
        window = self.ring_window(spec.layout)
        if window is None:
            return ""
        kept = format_bytes(spec.layout.nbytes(1, 0, window))
        return f", and at most {kept} for each row in layers that keep the last {window}"
