"""Check that the parts of an encoder-decoder's program compute with their caches what the model computes without.

The decoder takes its tokens in three chunks. Its logits must be the model's, with padding on the encoder's side; else a
CaptureError says how far they differ. See ``check_step_matches_model``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.capture.explain_failure import run_model
from adaptc.capture.run_graph import run_graph
from adaptc.generation.capture_step import check_logits
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK, decoder_inputs
from adaptc.passes.graph.subprogram import extract_subprogram

_ROWS, _TOKENS, _SOURCE_LENGTH, _PADDING = 2, 8, 6, 2


@torch.no_grad()
def check_seq2seq_matches_model(model: Any, program: ExportedProgram, spec: Seq2SeqSpec) -> None:
    """Raise CaptureError where the logits of the program's parts differ from the model's; see the module docstring.

    Nothing is checked on the meta device, nor for a program of fewer than three positions.
    """
    parameter = next(model.parameters())
    length = min(_TOKENS, spec.max_length)
    if parameter.device.type == "meta" or length < 3:
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (_ROWS, length), generator=draw).to(parameter.device)
    encoder_inputs: dict[str, Tensor] = {}
    if spec.feature_shape is None:
        encoder_inputs[spec.main_input_name] = torch.randint(
            0, spec.vocab_size, (_ROWS, _SOURCE_LENGTH), generator=draw
        ).to(parameter.device)
        encoder_inputs["attention_mask"] = torch.ones_like(encoder_inputs[spec.main_input_name])
        encoder_inputs["attention_mask"][0, :_PADDING] = 0
    else:
        encoder_inputs[spec.main_input_name] = torch.randn(_ROWS, *spec.feature_shape, generator=draw).to(parameter)
    expected = run_model(model, **encoder_inputs, decoder_input_ids=ids, use_cache=False).logits
    check_logits(
        _run_in_chunks(program, spec, encoder_inputs, ids),
        expected,
        spec,
        f"{type(model).__name__} does not say in steps what it says at once",
        "so it cannot be captured as an encoder and a step",
    )


def _run_in_chunks(
    program: ExportedProgram, spec: Seq2SeqSpec, encoder_inputs: dict[str, Tensor], ids: Tensor
) -> Tensor:
    parts = {name: extract_subprogram(program, outputs) for name, outputs in spec.part_outputs.items()}

    def run(name: str, **values: Any) -> Any:
        takes = parts[name].call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
        return run_graph(parts[name], **{n: values[n] for n in takes})

    values: dict[str, Any] = {**encoder_inputs, **run("encode", **encoder_inputs)}
    values |= run("cross", **values)
    values[STATES_MASK] = values.get("attention_mask", ids.new_ones(values[STATES].shape[:2]))
    mask, positions, out = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device).expand_as(ids), []
    for inputs in spec.cache_mode.check_inputs(spec, ids, mask, positions):
        values |= decoder_inputs(inputs)
        out.append(run("step", **values)["logits"])
    return torch.cat(out, 1)
