"""Compare the steps of a captured program with its model, on tokens drawn at random and on the example of a prompt.

A model may take another path for another kind of cache, which no guard of the capture knows of. Such a model must never
give wrong tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols

from adaptc.capture.check_size_one import run_without_effects
from adaptc.capture.explain_failure import run_model
from adaptc.capture.run_graph import run_graph
from adaptc.errors import AdaptcWarning, CaptureError, ConfigError
from adaptc.generation.cache.cache_layout import StateLayout, cache_from_output
from adaptc.generation.modes.prefill_part import (
    PREFILL,
    check_prefill_sizes,
    prefill_name,
    prompt_inputs,
    written_tensors,
)
from adaptc.generation.modes.static_step import token_inputs
from adaptc.generation.multimodal.multimodal_spec import MultimodalSpec
from adaptc.generation.multimodal.prompt_part import EMBEDS, POSITIONS, PROMPT_OUTPUTS
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK, decoder_inputs
from adaptc.generation.spec import GenerationSpec
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.subprogram import extract_subprogram

#: the most tokens of the text that steps are checked with; sliding windows that are shorter are exceeded
_TOKENS = 24
_ROWS, _PADDING = 2, 3
#: the tokens of prompts that are read at once; the chunks of most models are shorter than the last one
_PROMPT_LENGTHS = (2, 3, _TOKENS, 131)
#: the tokens of an encoder-decoder's answer, and of the text that its encoder reads
_DECODER_TOKENS, _SOURCE_LENGTH, _SOURCE_PADDING = 8, 6, 2


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
    name = type(model).__name__
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
    else:
        step = _step_of_program(program, spec)
        if spec.takes_position_ids:
            text["position_ids"] = positions
    seen = mask.bool()
    expected = run_model(model, **text, use_cache=False).logits[seen]
    found = torch.cat([step(**i) for i in spec.cache_mode.check_inputs(spec, ids, mask, positions)], 1)[seen]
    if (error := _difference(found, expected, spec)) is not None:
        raise CaptureError(f"{name} does not say {what} (logits differ by {error:.3g}), so it cannot be captured {so}")


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


@torch.no_grad()
def check_prefill_matches_model(model: Any, program: ExportedProgram, spec: GenerationSpec) -> None:
    """Raise CaptureError where a part that reads a prompt at once differs from the model.

    Logits, and what the part leaves in the cache, are compared for prompts of several lengths, one longer than the
    chunks of most models. The model reads each row by itself, without its padding. Nothing is checked on the meta
    device.
    """
    parameter, name = next(model.parameters()), type(model).__name__
    check_prefill_sizes(program, name, spec.max_length)
    if parameter.device.type == "meta":
        return
    assert spec.part_outputs is not None
    assert isinstance(spec.layout, StateLayout)
    part = extract_subprogram(program, spec.part_outputs[PREFILL])
    names = part.call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    states = {n for n, is_state in zip(spec.layout.names, spec.layout.is_state, strict=True) if is_state}
    for length in sorted({min(n, spec.max_length) for n in _PROMPT_LENGTHS} - {1}):
        ids = torch.randint(0, spec.vocab_size, (_ROWS, length), generator=draw).to(parameter.device)
        mask, padding = torch.ones_like(ids), min(_PADDING, length - 1)
        mask[0, :padding] = 0
        prompt = token_inputs(spec, ids.device, ids, None, _ROWS, length)
        if spec.takes_position_ids:
            prompt["position_ids"] = spec.step_positions((mask.cumsum(-1) - 1).clamp(min=0))
        named = prompt_inputs(
            spec.layout, {**prompt, "attention_mask": mask, "keep": torch.arange(length, device=ids.device)}
        )
        found = run_graph(part, **{n: named[n] for n in names})
        for row, start in ((0, padding), (1, 0)):
            out = run_model(model, input_ids=ids[row : row + 1, start:], use_cache=True)
            left = dict(zip(spec.layout.names, written_tensors(spec.layout, cache_from_output(out)), strict=True))
            expected = {"logits": out.logits, **left}
            for key, theirs in expected.items():
                ours = found[prefill_name(key)][row : row + 1]
                if key not in states:  # a cache of a sliding window ends with the prompt
                    axis = 1 if key == "logits" else 2
                    ours = ours.narrow(axis, length - theirs.shape[axis], theirs.shape[axis])
                if (error := _difference(ours, theirs, spec)) is not None:
                    raise CaptureError(
                        f"{name} gives other {key.partition('_')[0]} where it reads {length} tokens with padding at "
                        f"once (they differ by {error:.3g})"
                    )


@torch.no_grad()
def check_prompt_matches_model(model: Any, program: ExportedProgram, spec: MultimodalSpec) -> None:
    """Raise CaptureError where the logits of a prompt's embeddings differ from the model's for the prompt itself.

    Nothing is checked on the meta device. Raises ConfigError where the example has more tokens than a cache.
    """
    example = spec.example
    assert example is not None
    ids, mask = example["input_ids"], example["attention_mask"]
    if ids.shape[1] > spec.max_length:
        raise ConfigError(
            f"the example has {ids.shape[1]} tokens, more than max_length={spec.max_length}: compile with a larger one"
        )
    values, fixed = user_inputs(program), set[str]()
    for name in spec.prompt_inputs:
        if name not in spec.token_inputs and not free_symbols(values[name].shape[0]):
            fixed.add(f"{values[name].shape[0]} in {name!r}")
    if fixed:
        warnings.warn(
            f"{type(model).__name__} was captured for prompts with as many images or audio as the example has, "
            f"{', '.join(sorted(fixed))}: it counts them in Python. Calls with others fail",
            AdaptcWarning,
            stacklevel=6,
        )
    if ids.device.type == "meta":
        return
    part = extract_subprogram(program, spec.prompt_outputs)
    made = run_graph(part, **spec.part_inputs(example))
    positions, numbered = (mask.cumsum(-1) - 1).clamp(min=0) + spec.first_position, dict[str, torch.Tensor]()
    if spec.position_axes:
        positions = made[POSITIONS].permute(2, 0, 1)
    elif spec.takes_position_ids and not spec.counts_padding:
        numbered["position_ids"] = positions
    step, seen = _step_of_program(program, spec), mask.bool()
    found: list[torch.Tensor] = []
    start = 0
    for inputs in spec.cache_mode.check_inputs(spec, ids, mask, positions, is_whole=spec.looks_ahead):
        end = start + inputs["input_ids"].shape[1]
        embedded = torch.ones_like(inputs["embedded"])
        given = {"inputs_embeds": made[EMBEDS], **{n: made[PROMPT_OUTPUTS[n]] for n in spec.image_inputs}}
        inputs |= {name: values[:, start:end].contiguous() for name, values in given.items()}
        found.append(step(**inputs | {"embedded": embedded}))
        start = end
    with run_without_effects(model):
        expected = run_model(model, **example, **numbered, use_cache=False).logits[seen]
    if (error := _difference(torch.cat(found, 1)[seen], expected, spec)) is not None:
        raise CaptureError(
            f"{type(model).__name__} does not say in steps what it says at once of a prompt with "
            f"{', '.join(spec.prompt_inputs)} (logits differ by {error:.3g}), so it cannot be captured with one: "
            "generate texts, without example_inputs"
        )


def _step_of_program(program: ExportedProgram, spec: GenerationSpec) -> Callable[..., Tensor]:
    """Return a callable of the step of ``program``, from its inputs by name to its logits."""
    if spec.part_outputs is None:
        return partial(run_graph, program)
    part = extract_subprogram(program, spec.part_outputs["step"])
    names = part.call_spec.in_spec.children()[1].context  # type: ignore[union-attr]

    def step(**inputs: Tensor) -> Tensor:
        return run_graph(part, **{n: inputs[n] for n in names})["logits"]

    return step


def _difference(found: Tensor, expected: Tensor, spec: GenerationSpec) -> float | None:
    """Return by how much the logits or states ``found`` differ from those expected; None where both are equal but for
    rounding."""
    error, size = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    # Both compute with the same kernels; a wrong mask or position shows in the first digits.
    allowed = (1e-3 if spec.layout.dtype.itemsize >= 4 else 0.1) * size
    return None if bool(error <= allowed) else float(error)
