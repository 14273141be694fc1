"""Check a captured paged step against its model, on two texts that are read in chunks.

A model may take another path for another kind of cache, which no guard of the capture knows of. Such a model must never
give wrong tokens.
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
from adaptc.serving.paged_layout import SENTINEL, LayerGroup, PagedLayout

#: the ends of the chunks of each text: a chunk of one token, and windows that are shorter than a text are exceeded
_CHUNKS = ((0, 11, 12, 24), (0, 3, 9, 17))


@torch.no_grad()
def check_step_matches_model(model: Any, program: ExportedProgram, layout: PagedLayout, vocab_size: int) -> None:
    """Raise CaptureError where the logits of paged steps differ from the model's. Nothing is checked on the meta
    device."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, vocab_size, (1, chunks[-1]), generator=draw).to(device) for chunks in _CHUNKS]
    room = 2 * sum(chunks[-1] for chunks in _CHUNKS) + 2
    pools = {n: torch.zeros(room, layout.heads, layout.dim, dtype=layout.dtype, device=device) for n in layout.names}
    expected = [run_model(model, input_ids=text, use_cache=False).logits[0] for text in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    for spans in zip(*(pairwise(chunks) for chunks in _CHUNKS), strict=True):
        inputs = _step_inputs(layout, texts, spans, device)
        logits = run_graph(program, **inputs, **pools)[0]
        for rows, part in zip(found, logits.split([end - start for start, end in spans]), strict=True):
            rows.append(part)
    made, wanted = torch.cat([torch.cat(rows) for rows in found]).float(), torch.cat(expected).float()
    error, allowed = (made - wanted).abs().max(), (1e-3 if layout.dtype.itemsize >= 4 else 0.1) * wanted.abs().max()
    if not bool(error <= allowed):
        raise CaptureError(
            f"{type(model).__name__} does not say with a paged cache what it says itself (logits differ by "
            f"{float(error):.3g}), so it cannot be captured as a paged step"
        )


def _step_inputs(
    layout: PagedLayout, texts: list[Tensor], spans: tuple[tuple[int, int], ...], device: torch.device
) -> dict[str, Tensor]:
    """Return the inputs of the step that reads the tokens of ``spans`` of the texts."""
    positions = [torch.arange(start, end, device=device) for start, end in spans]
    inputs = {
        "input_ids": torch.cat([text[:, start:end] for text, (start, end) in zip(texts, spans, strict=True)], 1),
        "position_ids": torch.cat(positions)[None],
        "keep": torch.arange(sum(end - start for start, end in spans), device=device),
    }
    for group in layout.groups:
        reads, writes, queries, keys = [], [], [], []
        for i, (start, end) in enumerate(spans):
            rows = _rows_of_text(i, device)
            seen = torch.arange(0 if group.window is None else max(0, start - group.window + 1), end, device=device)
            place = rows if group.window is None else rows[torch.arange(len(rows), device=device) % group.window]
            reads.append(place[seen] if group.window is None else torch.where(seen < start, place[seen], SENTINEL))
            writes.append(_write_rows(group, place, start, end))
            queries.append(torch.stack([torch.full((end - start,), i, device=device), positions[i]]))
            keys.append(torch.stack([torch.full((len(seen),), i, device=device), seen]))
        if layout.latents is not None:
            firsts = torch.tensor([0, *(end - start for start, end in spans[:-1])], device=device).cumsum(0)
            inputs[group.reader_name] = firsts[torch.cat(keys, 1)[0]]
        (text, query), (key_text, key) = torch.cat(queries, 1)[..., None], torch.cat(keys, 1)[:, None]
        mask = (text == key_text) & (key <= query)
        if group.window is not None:
            mask &= key > query - group.window
        inputs |= {
            group.read_name: torch.cat(reads),
            group.write_name: torch.cat(writes),
            group.mask_name: mask[None, None],
        }
    return inputs


def _rows_of_text(index: int, device: torch.device) -> Tensor:
    """Return the rows of the pool for the positions of a text: those of two texts lie between each other."""
    longest = max(chunks[-1] for chunks in _CHUNKS)
    return torch.arange(longest, device=device).flip(0) * len(_CHUNKS) + index + SENTINEL + 1


def _write_rows(group: LayerGroup, place: Tensor, start: int, end: int) -> Tensor:
    """Return the rows that the tokens from ``start`` to ``end`` are written to; row 0 is never read."""
    rows = place[start:end]
    if group.window is None or end - start <= group.window:
        return rows
    return torch.cat([torch.zeros_like(rows[: -group.window]), rows[-group.window :]])
