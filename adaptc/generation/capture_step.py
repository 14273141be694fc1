"""Capture a causal model in the first cache mode whose logits are the model's.

The modes are tried in the order of ``all_modes.candidates``. The result is the captured step and its spec, or a
CaptureError with the reasons. A model may take another path for another kind of cache, which no guard of the capture
knows of. Such a model must never give wrong tokens, so each step is run on a text in the chunks that its mode gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK, decoder_inputs
from adaptc.generation.spec import GenerationSpec
from adaptc.passes.graph.subprogram import extract_subprogram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import CompilePlan
from adaptc.progress import stage

_MAX_MESSAGE = 300
#: the most tokens of the text that steps are checked with; sliding windows that are shorter are exceeded
_TOKENS = 24
_ROWS, _PADDING = 2, 3
#: the tokens of an encoder-decoder's answer, and of the text that its encoder reads
_DECODER_TOKENS, _SOURCE_LENGTH, _SOURCE_PADDING = 8, 6, 2


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
                check_step_matches_model(model, captured, spec)
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
def check_step_matches_model(model: Any, program: ExportedProgram, spec: GenerationSpec) -> None:
    """Raise CaptureError where the logits of a program's steps differ from the model's for tokens that are no padding.

    ``program`` is the captured step, or the three parts of an encoder-decoder, whose encoder reads padding. Nothing is
    checked on the meta device, nor for a program of too few positions.
    """
    parameter, is_seq2seq = next(model.parameters()), isinstance(spec, Seq2SeqSpec)
    tokens, padding = (_DECODER_TOKENS, 0) if is_seq2seq else (_TOKENS, _PADDING)
    length = min(tokens, spec.max_length)
    if parameter.device.type == "meta" or length <= padding + 2:
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (_ROWS, length), generator=draw).to(parameter.device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    name, step = type(model).__name__, partial(run_graph, program)
    text: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    what, so = f"{spec.cache_mode.text_manner} what it says itself", "as a step"
    if isinstance(spec, Seq2SeqSpec):
        source = _draw_source(spec, draw, parameter)
        step = _decoder_step(program, spec, source)
        text, what, so = (
            {**source, "decoder_input_ids": ids},
            "in steps what it says at once",
            "as an encoder and a step",
        )
    elif spec.takes_position_ids:
        text["position_ids"] = positions
    seen = mask.bool()
    expected = run_model(model, **text, use_cache=False).logits[seen]
    found = torch.cat([step(**i) for i in spec.cache_mode.check_inputs(spec, ids, mask, positions)], 1)[seen]
    error, size = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    # Both compute with the same kernels; a wrong mask or position shows in the first digits.
    allowed = (1e-3 if spec.layout.dtype.itemsize >= 4 else 0.1) * size
    if not bool(error <= allowed):
        raise CaptureError(
            f"{name} does not say {what} (logits differ by {float(error):.3g}), so it cannot be captured {so}"
        )


def _draw_source(spec: Seq2SeqSpec, draw: torch.Generator, like: Tensor) -> dict[str, Tensor]:
    """Draw what an encoder reads, on the device of ``like``: tokens with padding, or features of its dtype."""
    if spec.feature_shape is not None:
        return {spec.main_input_name: torch.randn(_ROWS, *spec.feature_shape, generator=draw).to(like)}
    ids = torch.randint(0, spec.vocab_size, (_ROWS, _SOURCE_LENGTH), generator=draw).to(like.device)
    mask = torch.ones_like(ids)
    mask[0, :_SOURCE_PADDING] = 0
    return {spec.main_input_name: ids, "attention_mask": mask}


def _decoder_step(program: ExportedProgram, spec: Seq2SeqSpec, source: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Return a callable of the decoder's steps, after the program's other parts have read ``source``."""
    parts = {name: extract_subprogram(program, outputs) for name, outputs in spec.part_outputs.items()}

    def run(name: str, values: Mapping[str, Tensor]) -> Any:
        takes = parts[name].call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
        return run_graph(parts[name], **{n: values[n] for n in takes})

    known: dict[str, Tensor] = {**source, **run("encode", source)}
    known |= run("cross", known)
    known[STATES_MASK] = known.get("attention_mask", known[STATES].new_ones(known[STATES].shape[:2], dtype=torch.int64))

    def step(**inputs: Any) -> Tensor:
        return run("step", known | decoder_inputs(inputs))["logits"]

    return step
