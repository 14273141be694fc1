"""Check that the parts of an encoder-decoder's program compute with their caches what the model computes without.

The decoder takes its tokens in three chunks. Its logits must be the model's, with padding on the encoder's side; else a
CaptureError says how far they differ. See ``check_step_matches_model``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.capture.explain_failure import run_model
from adaptc.capture.run_graph import run_graph
from adaptc.errors import CaptureError
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK
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
    expected = run_model(model, **encoder_inputs, decoder_input_ids=ids, use_cache=False).logits.float()
    found = _run_in_chunks(program, spec, encoder_inputs, ids).float()
    error, size = (found - expected).abs().max(), expected.abs().max()
    allowed = (1e-3 if spec.layout.dtype.itemsize >= 4 else 0.1) * size
    if not bool(error <= allowed):
        raise CaptureError(
            f"{type(model).__name__} does not say in steps what it says at once (logits differ by {float(error):.3g}), "
            "so it cannot be captured as an encoder and a step"
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
    rows, length, room = ids.shape[0], ids.shape[1], ids.shape[1] + 3
    for name, shape in zip(spec.layout.names, spec.layout.shapes(rows, room), strict=True):
        values[name] = torch.zeros(shape, dtype=spec.layout.dtype, device=ids.device)
    values["decoder_attention_mask"] = ids.new_ones(rows, room)
    values[STATES_MASK] = values.get("attention_mask", ids.new_ones(values[STATES].shape[:2]))
    out, cuts = [], (0, length // 2, length // 2 + 1, length)
    for start, end in pairwise(cuts):
        slots = torch.arange(start, end, device=ids.device)
        values |= {"slots": slots, "keep": torch.arange(end - start, device=ids.device)}
        values["decoder_position_ids"] = slots.expand(rows, -1).contiguous()
        values["decoder_input_ids"] = ids[:, start:end].contiguous()
        out.append(run("step", **values)["logits"])
    return torch.cat(out, 1)
