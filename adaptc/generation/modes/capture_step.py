"""Capture a causal model as the first kind of step whose logits are the model's.

A step with rings for sliding windows is tried first, or one with a recurrent state. Then come a cache with room for
more positions, one that ends with the step's tokens, and no cache at all. The result is the captured step and its
facts, or a CaptureError with the reasons.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from adaptc.capture.run_graph import run_graph
from adaptc.errors import AdaptcWarning, CaptureError, ConfigError, TargetError
from adaptc.generation.cache.cache_layout import CacheLayout, StateLayout
from adaptc.generation.modes.cache_modes import stepping_as
from adaptc.generation.modes.check_against_model import check_step_matches_model
from adaptc.generation.modes.static_step import Step
from adaptc.generation.spec import EXACT, NOTHING, ROOM, STATE, WINDOW, GenerationSpec
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import Planned
from adaptc.progress import stage

_LONGEST = 300
_CALLED = {
    WINDOW: "a step with rings",
    ROOM: "a step with its cache",
    EXACT: "a step with a cache that ends with it",
    STATE: "a step with its state",
    NOTHING: "a step without a cache",
}


def captured_step(
    model: Any,
    capture: Callable[[Step], Planned],
    adapt: Callable[[Planned], AdaptedProgram],
    facts_of: Callable[[CacheLayout, int], dict[str, Any]],
    max_length: int,
    positions: int | None,
    acts: Sequence[str] = (),
    reads_first: bool = False,
) -> tuple[AdaptedProgram, GenerationSpec]:
    """Return the adapted step of ``model`` and its facts.

    ``capture`` captures the model as a step, and ``adapt`` inserts the adapters. ``facts_of(layout, length)`` returns
    the facts that hold for any step with such a cache. ``max_length`` is the number of positions asked for,
    ``positions`` how many the model has, or None. ``acts`` names inputs that only adapters read. ``reads_first`` says
    that an adapter reads a duplicated base pass. Such a pass may fit a program of whole texts where no step has one.

    Warns where the step has no cache. Raises CaptureError where every kind fails, and ConfigError for more positions
    than the step can have.
    """
    failed: list[CaptureError] = []
    try:
        layout = CacheLayout.of(model)
    except CaptureError as error:
        layout = None
        failed.append(error)
    # A model with a table of positions takes another branch where all of them are used. The last token of a text is
    # never given to a step, so one position less is enough for every text.
    short = None if positions is None else positions - 1
    ways = [(NOTHING, None), *([] if short is None else [(NOTHING, short)])]
    if isinstance(layout, StateLayout):
        ways = [(STATE, None), *ways]
    elif layout is not None:
        ways = [*([] if layout.window is None else [(WINDOW, None)]), (ROOM, None), (EXACT, short), *ways]
    name = type(model).__name__
    for number, (keeps, most) in enumerate(ways, 1):
        held = layout if keeps != NOTHING and layout is not None else CacheLayout((), model.dtype)
        try:
            with stage(f"capturing {name} as {_CALLED[keeps]} (attempt {number} of at most {len(ways)})"):
                program, base, step = _captured(
                    model, capture, adapt, keeps, held, most, acts, reads_first and keeps != NOTHING
                )
        except CaptureError as error:
            failed.append(error)
            continue
        known = facts_of(held, max_length if most is None else _bounded(max_length, most, positions))
        takes = step.example_inputs
        why = _short(failed[0]) if failed else ""
        facts = GenerationSpec(
            **known,
            positions="position_ids" in takes,
            embeds="inputs_embeds" in takes,
            keeps=keeps,
            why=why,
            acts=tuple(acts),
        )
        try:
            with stage(f"checking {_CALLED[keeps]} against {name}"):
                check_step_matches_model(model, partial(run_graph, base), facts)
        except CaptureError as error:
            failed.append(error)
            continue
        if keeps == NOTHING:
            warnings.warn(
                f"{name} generates without a cache, so each token takes the time of the whole text: {why}",
                AdaptcWarning,
                stacklevel=6,
            )
        return program, facts
    first, last = failed[0], failed[-1]
    raise CaptureError(f"{first}. Nor without a cache: {last}" if last is not first else str(first)) from first


def _captured(
    model: Any,
    capture: Callable[[Step], Planned],
    adapt: Callable[[Planned], AdaptedProgram],
    keeps: str,
    layout: CacheLayout,
    most: int | None,
    acts: Sequence[str],
    may_lack: bool,
) -> tuple[AdaptedProgram, ExportedProgram, Step]:
    with stepping_as(model, keeps, layout, most, acts) as step:
        try:
            planned = capture(step)
            return adapt(planned), planned.captured.program, step
        except (CaptureError, TargetError) as error:
            if isinstance(error, TargetError) and not may_lack:
                raise
            raise CaptureError(f"{type(model).__name__} cannot be captured as {_CALLED[keeps]}: {error}") from error


def _bounded(asked: int, most: int, positions: int | None) -> int:
    if asked > most and asked != positions:
        raise ConfigError(f"max_length={asked} is more than the {most} positions that a step of this model can have")
    return min(asked, most)


def _short(error: CaptureError) -> str:
    """Return the message of ``error``, shortened, without its advice, which is for captures that fail for good."""
    text = str(error).partition(" What to try:")[0].strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
