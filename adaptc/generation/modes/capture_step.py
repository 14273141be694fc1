"""Capture a causal model as the first kind of step whose logits are the model's.

A step with rings for sliding windows is tried first, or one with a recurrent state. Then come a cache with room for
more positions, one that ends with the step's tokens, and no cache at all. The result is the captured step and its
spec, or a CaptureError with the reasons.
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
from adaptc.generation.modes.cache_modes import captured_in_mode
from adaptc.generation.modes.check_against_model import check_step_matches_model
from adaptc.generation.modes.static_step import StepExample
from adaptc.generation.spec import EXACT_LENGTH, RECURRENT, SLIDING_WINDOW, STATIC, UNCACHED, GenerationSpec
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import CompilePlan
from adaptc.progress import stage

_MAX_MESSAGE = 300
_MODE_NAMES = {
    SLIDING_WINDOW: "a step with rings",
    STATIC: "a step with its cache",
    EXACT_LENGTH: "a step with a cache that ends with it",
    RECURRENT: "a step with its state",
    UNCACHED: "a step without a cache",
}


def capture_step(
    model: Any,
    capture: Callable[[StepExample], CompilePlan],
    adapt: Callable[[CompilePlan], AdaptedProgram],
    spec_fields: Callable[[CacheLayout, int], dict[str, Any]],
    max_length: int,
    position_count: int | None,
    token_gate_inputs: Sequence[str] = (),
    reads_base_pass: bool = False,
) -> tuple[AdaptedProgram, GenerationSpec]:
    """Return the adapted step of ``model`` and its spec.

    ``capture`` captures the model as a step, and ``adapt`` inserts the adapters. ``spec_fields(layout, length)``
    returns the fields of the spec that hold for any step with such a cache. ``max_length`` is the number of positions
    asked for, ``position_count`` how many the model has, or None. ``token_gate_inputs`` names inputs that only adapters
    read. ``reads_base_pass`` says that an adapter reads a duplicated base pass. Such a pass may fit a program of whole
    texts where no step has one.

    Warns where the step has no cache. Raises CaptureError where every kind fails, and ConfigError for more positions
    than the step can have.
    """
    failures: list[CaptureError] = []
    try:
        layout = CacheLayout.from_model(model)
    except CaptureError as error:
        layout = None
        failures.append(error)
    # A model with a table of positions takes another branch where all of them are used. The last token of a text is
    # never given to a step, so one position less is enough for every text.
    short = None if position_count is None else position_count - 1
    attempts = [(UNCACHED, None), *([] if short is None else [(UNCACHED, short)])]
    if isinstance(layout, StateLayout):
        attempts = [(RECURRENT, None), *attempts]
    elif layout is not None:
        attempts = [
            *([] if layout.sliding_window is None else [(SLIDING_WINDOW, None)]),
            (STATIC, None),
            (EXACT_LENGTH, short),
            *attempts,
        ]
    name = type(model).__name__
    for number, (cache_mode, size_limit) in enumerate(attempts, 1):
        mode_layout = layout if cache_mode != UNCACHED and layout is not None else CacheLayout((), model.dtype)
        try:
            with stage(f"capturing {name} as {_MODE_NAMES[cache_mode]} (attempt {number} of at most {len(attempts)})"):
                program, captured, step = _capture_in_mode(
                    model,
                    capture,
                    adapt,
                    cache_mode,
                    mode_layout,
                    size_limit,
                    token_gate_inputs,
                    reads_base_pass and cache_mode != UNCACHED,
                )
        except CaptureError as error:
            failures.append(error)
            continue
        known = spec_fields(
            mode_layout, max_length if size_limit is None else _limit_length(max_length, size_limit, position_count)
        )
        takes = step.example_inputs
        mode_reason = _shortened_message(failures[0]) if failures else ""
        spec = GenerationSpec(
            **known,
            takes_position_ids="position_ids" in takes,
            takes_inputs_embeds="inputs_embeds" in takes,
            cache_mode=cache_mode,
            mode_reason=mode_reason,
            token_gate_inputs=tuple(token_gate_inputs),
        )
        try:
            with stage(f"checking {_MODE_NAMES[cache_mode]} against {name}"):
                check_step_matches_model(model, partial(run_graph, captured), spec)
        except CaptureError as error:
            failures.append(error)
            continue
        if cache_mode == UNCACHED:
            warnings.warn(
                f"{name} generates without a cache, so each token takes the time of the whole text: {mode_reason}",
                AdaptcWarning,
                stacklevel=6,
            )
        return program, spec
    first, last = failures[0], failures[-1]
    raise CaptureError(f"{first}. Nor without a cache: {last}" if last is not first else str(first)) from first


def _capture_in_mode(
    model: Any,
    capture: Callable[[StepExample], CompilePlan],
    adapt: Callable[[CompilePlan], AdaptedProgram],
    cache_mode: str,
    layout: CacheLayout,
    size_limit: int | None,
    token_gate_inputs: Sequence[str],
    may_lack_targets: bool,
) -> tuple[AdaptedProgram, ExportedProgram, StepExample]:
    with captured_in_mode(model, cache_mode, layout, size_limit, token_gate_inputs) as step:
        try:
            planned = capture(step)
            return adapt(planned), planned.captured.program, step
        except (CaptureError, TargetError) as error:
            if isinstance(error, TargetError) and not may_lack_targets:
                raise
            raise CaptureError(
                f"{type(model).__name__} cannot be captured as {_MODE_NAMES[cache_mode]}: {error}"
            ) from error


def _limit_length(requested: int, size_limit: int, position_count: int | None) -> int:
    if requested > size_limit and requested != position_count:
        raise ConfigError(
            f"max_length={requested} is more than the {size_limit} positions that a step of this model can have"
        )
    return min(requested, size_limit)


def _shortened_message(error: CaptureError) -> str:
    """Return the message of ``error``, shortened, without its advice, which is for captures that fail for good."""
    text = str(error).partition(" What to try:")[0].strip()
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
