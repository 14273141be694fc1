"""Capture a causal model in the first cache mode whose logits are the model's.

The modes are tried in the order of ``all_modes.candidates``. The result is the captured step and its spec, or a
CaptureError with the reasons. A model may take another path for another kind of cache, which no guard of the capture
knows of. Such a model must never give wrong tokens, so each step is run on a text in the chunks that its mode gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from adaptc.errors import AdaptcWarning, CaptureError, ConfigError, TargetError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.compare_with_model import (
    check_prefill_matches_model,
    check_prompt_matches_model,
    check_step_matches_model,
)
from adaptc.generation.modes.all_modes import Candidate, candidates
from adaptc.generation.modes.prefill_part import captured_with_prefill
from adaptc.generation.modes.static_step import StepExample
from adaptc.generation.multimodal.multimodal_spec import MultimodalSpec
from adaptc.generation.multimodal.prompt_part import Prompts
from adaptc.generation.spec import GenerationSpec
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import CompilePlan
from adaptc.progress import stage

_MAX_MESSAGE = 300


def capture_step(
    model: Any,
    capture: Callable[[StepExample], CompilePlan],
    adapt: Callable[[CompilePlan], AdaptedProgram],
    spec_fields: Callable[[CacheLayout, int], dict[str, Any]],
    max_length: int,
    position_count: int | None,
    token_gate_inputs: Sequence[str] = (),
    reads_base_pass: bool = False,
    prompts: Prompts | None = None,
) -> tuple[AdaptedProgram, GenerationSpec]:
    """Return the adapted step of ``model`` and its spec.

    ``capture`` captures the model as a step, and ``adapt`` inserts the adapters. ``spec_fields(layout, length)``
    returns the fields of the spec that hold for any step with such a cache. ``max_length`` is the number of positions
    asked for, ``position_count`` how many the model has, or None. ``token_gate_inputs`` names inputs that only adapters
    read. ``reads_base_pass`` says that an adapter reads a duplicated base pass. Such a pass may fit a program of whole
    texts where no step has one. ``prompts`` describes prompts with images or audio; None for texts alone.

    Warns where the step has no cache. Raises CaptureError where every kind fails, and ConfigError for more positions
    than the step can have.
    """
    failures: list[CaptureError] = []
    try:
        layout = CacheLayout.from_model(model)
    except CaptureError as error:
        layout = None
        failures.append(error)
    attempts = candidates(model, layout, position_count)
    prefill_reason = ""
    if reads_base_pass or prompts is not None:
        attempts = [a for a in attempts if not a.has_prefill]
        prefill_reason = (
            "images or audio may be among its tokens"
            if prompts is not None
            else "X-LoRA runs the base before the adapter"
        )
    if prompts is not None:  # without a cache each step would read the images again
        ahead = prompts.description.looks_ahead  # in a ring, no position is after a token
        attempts = [a for a in attempts if a.mode.has_cache and not (ahead and a.mode.ring_window(a.layout))]
    name = type(model).__name__
    for number, candidate in enumerate(attempts, 1):
        mode, size_limit = candidate.mode, candidate.size_limit
        try:
            with stage(f"capturing {name} as {mode.step_name} (attempt {number} of at most {len(attempts)})"):
                program, captured, step = _capture_in_mode(
                    model, capture, adapt, candidate, token_gate_inputs, reads_base_pass and mode.has_cache, prompts
                )
        except CaptureError as error:
            if candidate.has_prefill:
                prefill_reason = _shortened_message(error)
            else:
                failures.append(error)
            continue
        known = spec_fields(
            candidate.layout,
            max_length if size_limit is None else _limit_length(max_length, size_limit, position_count),
        )
        takes = step.example_inputs
        mode_reason = _shortened_message(failures[0]) if failures else ""
        kind = GenerationSpec if prompts is None else partial(MultimodalSpec, **prompts.spec_fields())
        spec = kind(
            **known,
            takes_position_ids="position_ids" in takes,
            takes_inputs_embeds="inputs_embeds" in takes,
            cache_mode=mode,
            mode_reason=mode_reason,
            has_prefill=candidate.has_prefill,
            prefill_reason=prefill_reason,
            token_gate_inputs=tuple(token_gate_inputs),
        )
        try:
            with stage(f"checking {mode.step_name} against {name}"):
                if spec.has_prefill:
                    check_prefill_matches_model(model, captured, spec)
                check_step_matches_model(model, captured, spec)
                if isinstance(spec, MultimodalSpec):
                    check_prompt_matches_model(model, captured, spec)
        except CaptureError as error:
            if candidate.has_prefill:
                prefill_reason = _shortened_message(error)
            else:
                failures.append(error)
            continue
        if not mode.has_cache:
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
    candidate: Candidate,
    token_gate_inputs: Sequence[str],
    may_lack_targets: bool,
    prompts: Prompts | None,
) -> tuple[AdaptedProgram, ExportedProgram, StepExample]:
    mode = candidate.mode
    alone = partial(mode.capture, model, candidate.layout, candidate.size_limit, token_gate_inputs)
    if prompts is not None:
        context = prompts.captured(model, alone)
    else:
        context = captured_with_prefill(model, candidate.layout, alone) if candidate.has_prefill else alone()
    with context as step:
        try:
            planned = capture(step)
            return adapt(planned), planned.captured.program, step
        except (CaptureError, TargetError) as error:
            if isinstance(error, TargetError) and not may_lack_targets and not candidate.has_prefill:
                raise
            raise CaptureError(f"{type(model).__name__} cannot be captured as {mode.step_name}: {error}") from error


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
