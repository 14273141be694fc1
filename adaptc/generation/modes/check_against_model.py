"""Check that a step program computes with its cache what its model computes without one.

A prompt is taken in three chunks: several tokens, one, and the rest. Its logits must be the model's for every token
that is no padding; else a CaptureError says how far they differ. A model may take another path for another kind of
cache, which no guard of the capture knows of. Such a model must never give wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.explain_failure import run_model
from adaptc.errors import CaptureError
from adaptc.generation.spec import EXACT_LENGTH, RECURRENT, SLIDING_WINDOW, STATIC, UNCACHED, GenerationSpec

#: the most tokens of the prompt; sliding windows that are shorter are exceeded
_TOKENS = 24
_ROWS, _PADDING = 2, 3
_MODE_PHRASES = {
    SLIDING_WINDOW: "with rings",
    STATIC: "with a cache of fixed room",
    EXACT_LENGTH: "with a cache in pieces",
    RECURRENT: "token by token",
    UNCACHED: "of other lengths",
}


@torch.no_grad()
def check_step_matches_model(model: Any, step: Callable[..., Tensor], spec: GenerationSpec) -> None:
    """Raise CaptureError where the logits of ``step`` differ from the model's; see the module docstring.

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
    found = _run_in_chunks(step, spec, ids, mask, positions)
    seen = mask.bool()
    error = (found[seen].float() - expected[seen].float()).abs().max()
    size = expected[seen].float().abs().max()
    # Both compute with the same kernels; a wrong mask or position shows in the first digits.
    allowed = (1e-3 if spec.layout.dtype.itemsize >= 4 else 0.1) * size
    if not bool(error <= allowed):
        raise CaptureError(
            f"{type(model).__name__} does not say {_MODE_PHRASES[spec.cache_mode]} what it says itself (logits differ "
            f"by {float(error):.3g}), so it cannot be captured as a step"
        )


def _run_in_chunks(
    step: Callable[..., Tensor], spec: GenerationSpec, ids: Tensor, mask: Tensor, positions: Tensor
) -> Tensor:
    length, device = ids.shape[1], ids.device
    if spec.cache_mode == UNCACHED:
        given = {"position_ids": positions} if spec.takes_position_ids else {}
        return step(input_ids=ids, attention_mask=mask, **given, keep=torch.arange(length, device=device))
    if spec.cache_mode == RECURRENT:
        states = spec.layout.zeros(_ROWS, device)
        each = [{"input_ids": ids[:, i : i + 1].contiguous(), "seen": mask[:, i].bool()} for i in range(length)]
        more = _unused_embedding_inputs(spec, 1, device)
        return torch.cat([step(**one, **more, **states) for one in each], 1)
    room = length + 3
    # The ring is as small as the largest chunk allows, so that positions in it are overwritten.
    ring = None if spec.sliding_window is None else min(room, spec.sliding_window + length // 2)
    cache = spec.layout.zeros(_ROWS, device, room, ring)
    wide = torch.cat([mask, mask.new_ones(_ROWS, room - length)], 1)
    logits, cuts = [], (0, length // 2, length // 2 + 1, length)
    for start, end in pairwise(cuts):
        seen = end if spec.cache_mode == EXACT_LENGTH else room
        inputs = {"input_ids": ids[:, start:end].contiguous(), "attention_mask": wide[:, :seen]}
        inputs |= {n: t[:, :, :seen] for n, t in cache.items()}
        if spec.takes_position_ids:
            inputs["position_ids"] = positions[:, start:end].contiguous()
        inputs |= _unused_embedding_inputs(spec, end - start, device)
        inputs |= {n: torch.zeros_like(inputs["input_ids"], dtype=torch.bool) for n in spec.token_gate_inputs}
        slots = torch.arange(start, end, device=device)
        logits.append(step(**inputs, slots=slots, keep=torch.arange(end - start, device=device)))
    return torch.cat(logits, 1)


def _unused_embedding_inputs(spec: GenerationSpec, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Return the unused embedding inputs that go with tokens; {} where the step takes no embeddings."""
    if not spec.takes_inputs_embeds:
        return {}
    nothing = torch.zeros(_ROWS, tokens, spec.hidden_size, dtype=spec.embeds_dtype, device=device)
    return {"inputs_embeds": nothing, "embedded": torch.tensor(False, device=device)}
