"""Random steps: inputs of a step program, as a generation would give them.

Before: the facts of a step. After: prompts of several sizes for caches with something in them, for verification of
compiled code, which does not say by itself that tokens go where there is room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.facts import Facts

_MOST = 7


def drawn(facts: Facts, device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of verify, with ``inputs`` in the place of ``shapes``. Raises AdaptcError for shapes that are no
    number."""
    options = dict(options)
    if options.get("inputs") is not None:
        return options
    count = options.pop("shapes", None)
    if count is None:
        count = 3
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise AdaptcError("shapes: of what generates they are drawn; give how many, or complete inputs with inputs=")
    draw = torch.Generator().manual_seed(options.get("seed") or 0)
    options["inputs"] = [_step(facts, device, draw) for _ in range(count)]
    return options


def pair(facts: Facts, device: torch.device) -> list[dict[str, Tensor]]:
    """Inputs of two steps of three rows with equal sizes, which differ in their tokens and in what the cache holds."""
    out = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        rows, tokens, length = 3, 2, min(5, facts.max_length)
        mask, slots = torch.ones(rows, length, dtype=torch.int64), torch.arange(length - tokens, length)
        out.append(_inputs(facts, device, draw, (rows, tokens, length), mask, slots, torch.arange(tokens), False))
    return out


def _step(facts: Facts, device: torch.device, draw: torch.Generator) -> dict[str, Tensor]:
    def number(least: int, most: int) -> int:
        return int(torch.randint(least, max(least, most) + 1, (), generator=draw))

    rows = number(1, min(facts.max_batch, _MOST))
    length = number(1, min(facts.max_length, 2 * _MOST))
    tokens = number(1, min(length, _MOST))
    before = number(0, length - tokens)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, : before // 2] = 0
    slots = torch.arange(before, before + tokens)
    keep = torch.arange(tokens - number(1, tokens), tokens)
    embedded = bool(number(0, 1))
    return _inputs(facts, device, draw, (rows, tokens, length), mask, slots, keep, embedded)


def _inputs(
    facts: Facts,
    device: torch.device,
    draw: torch.Generator,
    sizes: tuple[int, int, int],
    mask: Tensor,
    slots: Tensor,
    keep: Tensor,
    embedded: bool,
) -> dict[str, Tensor]:
    rows, tokens, length = sizes
    inputs = {
        "input_ids": torch.randint(0, facts.vocabulary, (rows, tokens), generator=draw),
        "attention_mask": mask,
        "slots": slots,
        "keep": keep,
    }
    if facts.positions:
        inputs["position_ids"] = slots.expand(rows, -1).contiguous()
    if facts.embeds:
        inputs["inputs_embeds"] = torch.randn(rows, tokens, facts.width, generator=draw).to(facts.embeds_dtype)
        inputs["embedded"] = torch.tensor(embedded)
    for name, shape in zip(facts.layout.names, facts.layout.shapes(rows, length), strict=True):
        inputs[name] = torch.randn(shape, generator=draw).to(facts.layout.dtype)
    return {name: value.to(device) for name, value in inputs.items()}
