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
from adaptc.generation.seq2seq.seq2seq_step import MASK, STATES
from adaptc.passes.graph.subprogram import part_of

_ROWS, _TOKENS, _READ, _PADDED = 2, 8, 6, 2


@torch.no_grad()
def check_seq2seq_matches_model(model: Any, program: ExportedProgram, facts: Seq2SeqSpec) -> None:
    """Raise CaptureError where the logits of the program's parts differ from the model's; see the module docstring.

    Nothing is checked on the meta device, nor for a program of fewer than three positions.
    """
    first = next(model.parameters())
    length = min(_TOKENS, facts.max_length)
    if first.device.type == "meta" or length < 3:
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, facts.vocabulary, (_ROWS, length), generator=draw).to(first.device)
    given: dict[str, Tensor] = {}
    if facts.features is None:
        given[facts.main] = torch.randint(0, facts.vocabulary, (_ROWS, _READ), generator=draw).to(first.device)
        given["attention_mask"] = torch.ones_like(given[facts.main])
        given["attention_mask"][0, :_PADDED] = 0
    else:
        given[facts.main] = torch.randn(_ROWS, *facts.features, generator=draw).to(first)
    expected = run_model(model, **given, decoder_input_ids=ids, use_cache=False).logits.float()
    found = _in_pieces(program, facts, given, ids).float()
    error, size = (found - expected).abs().max(), expected.abs().max()
    allowed = (1e-3 if facts.layout.dtype.itemsize >= 4 else 0.1) * size
    if not bool(error <= allowed):
        raise CaptureError(
            f"{type(model).__name__} does not say in steps what it says at once (logits differ by {float(error):.3g}), "
            "so it cannot be captured as an encoder and a step"
        )


def _in_pieces(program: ExportedProgram, facts: Seq2SeqSpec, given: dict[str, Tensor], ids: Tensor) -> Tensor:
    parts = {name: part_of(program, outputs) for name, outputs in facts.parts.items()}

    def run(name: str, **known: Any) -> Any:
        takes = parts[name].call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
        return run_graph(parts[name], **{n: known[n] for n in takes})

    known: dict[str, Any] = {**given, **run("encode", **given)}
    known |= run("cross", **known)
    rows, length, room = ids.shape[0], ids.shape[1], ids.shape[1] + 3
    for name, shape in zip(facts.layout.names, facts.layout.shapes(rows, room), strict=True):
        known[name] = torch.zeros(shape, dtype=facts.layout.dtype, device=ids.device)
    known["decoder_attention_mask"] = ids.new_ones(rows, room)
    known[MASK] = known.get("attention_mask", ids.new_ones(known[STATES].shape[:2]))
    out, cuts = [], (0, length // 2, length // 2 + 1, length)
    for start, end in pairwise(cuts):
        slots = torch.arange(start, end, device=ids.device)
        known |= {"slots": slots, "keep": torch.arange(end - start, device=ids.device)}
        known["decoder_position_ids"] = slots.expand(rows, -1).contiguous()
        known["decoder_input_ids"] = ids[:, start:end].contiguous()
        out.append(run("step", **known)["logits"])
    return torch.cat(out, 1)
