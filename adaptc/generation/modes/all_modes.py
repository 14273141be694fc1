"""List the cache modes: those that are tried for a model, best first, and all of them by their names in files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.generation.cache.cache_layout import CacheLayout, HybridLayout, StateLayout
from adaptc.generation.modes.cache_mode import CacheMode
from adaptc.generation.modes.exact_length_mode import ExactLengthMode
from adaptc.generation.modes.hybrid_mode import HybridMode
from adaptc.generation.modes.recurrent_mode import RecurrentMode
from adaptc.generation.modes.sliding_window_mode import SlidingWindowMode
from adaptc.generation.modes.static_mode import StaticMode
from adaptc.generation.modes.static_step import StepSpec
from adaptc.generation.modes.uncached_mode import UncachedMode

SLIDING_WINDOW, STATIC, EXACT_LENGTH, RECURRENT, HYBRID, UNCACHED = MODES = (
    SlidingWindowMode(),
    StaticMode(),
    ExactLengthMode(),
    RecurrentMode(),
    HybridMode(),
    UncachedMode(),
)
_BY_NAME: Mapping[str, CacheMode] = {mode.name: mode for mode in MODES}


class Candidate(NamedTuple):
    """A mode in which a model may be captured, with the cache's layout and the most positions that a step may have.

    ``size_limit`` None means any number. ``has_prefill`` says that the program also has a part that reads a prompt at
    once.
    """

    mode: CacheMode
    layout: CacheLayout
    size_limit: int | None = None
    has_prefill: bool = False


def candidates(model: nn.Module, layout: CacheLayout | None, position_count: int | None) -> list[Candidate]:
    """Return the modes to try for ``model``, best first.

    ``layout`` is that of the model's own cache; None where it has none that a step could take. ``position_count`` is
    the number of positions that the model has; None for any number.
    """
    dtype: Any = getattr(model, "dtype", torch.float32)
    # A model with a table of positions takes another branch where all of them are used. The last token of a text is
    # never given to a step, so one position less is enough for every text.
    short = None if position_count is None else position_count - 1
    found = [Candidate(UNCACHED, CacheLayout((), dtype), limit) for limit in dict.fromkeys((None, short))]
    if layout is None:
        return found
    if isinstance(layout, StateLayout):
        mode = HYBRID if isinstance(layout, HybridLayout) else RECURRENT
        return [Candidate(mode, layout, has_prefill=True), Candidate(mode, layout), *found]
    rings = [] if layout.sliding_window is None else [Candidate(SLIDING_WINDOW, layout)]
    return [*rings, Candidate(STATIC, layout), Candidate(EXACT_LENGTH, layout, short), *found]


def mode_to_json(mode: CacheMode, spec: StepSpec) -> dict[str, str]:
    """Return what a file says of ``mode``; nothing for the static mode, which files without an entry have."""
    return {} if mode.name == STATIC.name else {"keeps": mode.name, "why": spec.mode_reason}


def mode_from_json(stored: Mapping[str, Any], layout: CacheLayout, inputs: Collection[str]) -> CacheMode:
    """Return the mode of a file, for a program with these ``inputs``.

    Raises UnsafeFile for a name that no mode has, and for a mode that does not fit the program.
    """
    name = stored.get("keeps", STATIC.name)
    mode = _BY_NAME.get(name)
    if mode is None:
        raise UnsafeFile(f"what it keeps is {short_repr(name)}, of {len(layout.layers)} layers")
    if why := mode.misfit(layout, inputs):
        raise UnsafeFile(why)
    return mode
