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

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.capture.explain_failure import run_model
from adaptc.capture.run_graph import run_graph
from adaptc.errors import AdaptcWarning, CaptureError, ConfigError, TargetError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.modes.all_modes import Candidate, candidates
from adaptc.generation.modes.static_step import StepExample
from adaptc.generation.spec import GenerationSpec
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import CompilePlan
from adaptc.progress import stage

_MAX_MESSAGE = 300
#: the most tokens of the text that steps are checked with; sliding windows that are shorter are exceeded
_TOKENS = 24
_ROWS, _PADDING = 2, 3


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
    attempts = candidates(model, layout, position_count)
    name = type(model).__name__
    for number, candidate in enumerate(attempts, 1):
        mode, size_limit = candidate.mode, candidate.size_limit
        try:
            with stage(f"capturing {name} as {mode.step_name} (attempt {number} of at most {len(attempts)})"):
                program, captured, step = _capture_in_mode(
                    model, capture, adapt, candidate, token_gate_inputs, reads_base_pass and mode.has_cache
                )
        except CaptureError as error:
            failures.append(error)
            continue
        known = spec_fields(
            candidate.layout,
            max_length if size_limit is None else _limit_length(max_length, size_limit, position_count),
        )
        takes = step.example_inputs
        mode_reason = _shortened_message(failures[0]) if failures else ""
        spec = GenerationSpec(
            **known,
            takes_position_ids="position_ids" in takes,
            takes_inputs_embeds="inputs_embeds" in takes,
            cache_mode=mode,
            mode_reason=mode_reason,
            token_gate_inputs=tuple(token_gate_inputs),
        )
        try:
            with stage(f"checking {mode.step_name} against {name}"):
                check_step_matches_model(model, partial(run_graph, captured), spec)
        except CaptureError as error:
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
) -> tuple[AdaptedProgram, ExportedProgram, StepExample]:
    mode = candidate.mode
    with mode.capture(model, candidate.layout, candidate.size_limit, token_gate_inputs) as step:
        try:
            planned = capture(step)
            return adapt(planned), planned.captured.program, step
        except (CaptureError, TargetError) as error:
            if isinstance(error, TargetError) and not may_lack_targets:
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


@torch.no_grad()
def check_step_matches_model(model: Any, step: Callable[..., Tensor], spec: GenerationSpec) -> None:
    """Raise CaptureError where the logits of ``step`` differ from the model's for tokens that are no padding.

    ``step`` is called with the inputs of the step program. Nothing is checked on the meta device, nor for a program of
    at most five positions.
    """
    device = next(model.parameters()).device
    length = min(_TOKENS, spec.max_length)
    if device.type == "meta" or length <= _PADDING + 2:
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (_ROWS, length), generator=draw).to(device)
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Tensor] = {"position_ids": positions} if spec.takes_position_ids else {}
    expected = run_model(model, input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
    found = torch.cat([step(**i) for i in spec.cache_mode.check_inputs(spec, ids, mask, positions)], 1)
    seen = mask.bool()
    check_logits(
        found[seen],
        expected[seen],
        spec,
        f"{type(model).__name__} does not say {spec.cache_mode.text_manner} what it says itself",
        "so it cannot be captured as a step",
    )


def check_logits(found: Tensor, expected: Tensor, spec: GenerationSpec, what: str, so: str) -> None:
    """Raise CaptureError where the logits ``found`` of a program are not the model's, ``expected``.

    The message says ``what`` differs, how far, and what follows, ``so``.
    """
    error, size = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    # Both compute with the same kernels; a wrong mask or position shows in the first digits.
    allowed = (1e-3 if spec.layout.dtype.itemsize >= 4 else 0.1) * size
    if not bool(error <= allowed):
        raise CaptureError(f"{what} (logits differ by {float(error):.3g}), {so}")
