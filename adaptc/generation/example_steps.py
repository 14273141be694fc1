"""Draw random inputs of a step program, as a generation would give them.

They are prompts of several sizes for caches with tokens in them. Verification of compiled code uses them, because
compiled code does not record that tokens go to free positions of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import MASK, STATES
from adaptc.generation.spec import EXACT, NOTHING, STATE, GenerationSpec

_MOST = 7


def drawn(
    facts: GenerationSpec,
    device: torch.device,
    options: Mapping[str, Any],
    step: Callable[..., dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Return the ``options`` of verify with drawn ``inputs`` in the place of the number ``shapes``; ``step`` draws
    each.

    Given ``inputs`` stay. Raises AdaptcError where ``shapes`` is not a number of at least one.
    """
    options = dict(options)
    if options.get("inputs") is not None:
        return options
    count = options.pop("shapes", None)
    if count is None:
        count = 3
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise AdaptcError("shapes: of what generates they are drawn; give how many, or complete inputs with inputs=")
    draw = torch.Generator().manual_seed(options.get("seed") or 0)
    made = [(step or _step)(facts, draw) for _ in range(count)]
    options["inputs"] = [{name: value.to(device) for name, value in inputs.items()} for inputs in made]
    return options


def _number(draw: torch.Generator, least: int, most: int) -> int:
    return int(torch.randint(least, max(least, most) + 1, (), generator=draw))


def step_across(
    facts: Seq2SeqSpec, draw: torch.Generator, values: torch.Generator | None = None, rows: int | None = None
) -> dict[str, Tensor]:
    """Draw the inputs of an encoder-decoder's program: a step, and independent rows for the encoder.

    ``draw`` draws the sizes, and ``values`` all else; None means ``draw``.
    """
    sources, values = rows, draw if values is None else values
    renamed = {"input_ids", "attention_mask", "position_ids"}
    inputs = {f"decoder_{n}" if n in renamed else n: t for n, t in _step(facts, draw, values, rows).items()}
    rows = inputs["decoder_input_ids"].shape[0]
    sources, read = _number(draw, 1, _MOST) if sources is None else sources, _number(draw, 1, 2 * _MOST)
    if facts.features is None:
        read = min(read, facts.source or read)
        inputs[facts.main] = torch.randint(0, facts.vocabulary, (sources, read), generator=values)
        inputs["attention_mask"] = torch.ones(sources, read, dtype=torch.int64)
        inputs[MASK] = torch.ones(rows, read, dtype=torch.int64)
    else:
        read = facts.features[-1] // (facts.strides[0] * facts.strides[1])
        inputs[facts.main] = torch.randn(sources, *facts.features, generator=values).to(facts.embeds_dtype)
    inputs[STATES] = torch.randn(rows, read, facts.hidden, generator=values).to(facts.cross.dtype)
    for name, shape in zip(facts.cross.names, facts.cross.shapes(rows, read), strict=True):
        inputs[name] = torch.randn(shape, generator=values).to(facts.cross.dtype)
    return inputs


def pair(facts: Any, device: torch.device, step: Callable[..., Any] | None = None) -> list[dict[str, Tensor]]:
    """Draw the inputs of two steps of three rows, with equal sizes but different tokens and cache contents.

    ``step`` draws each; None means the step of a causal model.
    """
    out = []
    for seed in (1, 2):
        sizes, values = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
        made = (step or _step)(facts, sizes, values, rows=3)
        if "embedded" in made:
            made["embedded"] = torch.tensor(False)
        out.append({name: value.to(device) for name, value in made.items()})
    return out


def _step(
    facts: GenerationSpec, draw: torch.Generator, values: torch.Generator | None = None, rows: int | None = None
) -> dict[str, Tensor]:
    """Draw the inputs of a causal model's step: ``draw`` draws the sizes, and ``values`` all else; None means
    ``draw``."""
    values = draw if values is None else values

    def number(least: int, most: int) -> int:
        return _number(draw, least, most)

    rows = number(1, min(facts.max_batch, _MOST)) if rows is None else rows
    length = number(1, min(facts.max_length, 2 * _MOST))
    tokens = length if facts.keeps == NOTHING else number(1, min(length, _MOST))
    before = length - tokens if facts.keeps == EXACT else number(0, length - tokens)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, : before // 2] = 0
    slots = torch.arange(before, before + tokens)
    inputs = {
        "input_ids": torch.randint(0, facts.vocabulary, (rows, tokens), generator=values),
        "attention_mask": mask,
        "keep": torch.arange(tokens - number(1, tokens), tokens),
    }
    if facts.keeps == STATE:
        seen = torch.randint(0, 2, (rows,), generator=values).bool()
        states = facts.layout.zeros(rows, torch.device("cpu"))
        drawn = {n: torch.randn(t.shape, generator=values).to(t.dtype) for n, t in states.items()}
        one = {"input_ids": inputs["input_ids"][:, :1].contiguous(), "seen": seen, **drawn}
        return one | _embedded(facts, values, rows, 1)
    if facts.keeps != NOTHING:
        inputs["slots"] = slots
    if facts.positions:
        inputs["position_ids"] = slots.expand(rows, -1).contiguous()
    inputs |= _embedded(facts, values, rows, tokens)
    for name in facts.acts:
        inputs[name] = torch.randint(0, 2, (rows, tokens), generator=values).bool()
    ring = None if facts.window is None else min(length, facts.window + tokens - 1)
    for name, shape in zip(facts.layout.names, facts.layout.shapes(rows, length, ring), strict=True):
        inputs[name] = torch.randn(shape, generator=values).to(facts.layout.dtype)
    return inputs


def _embedded(facts: GenerationSpec, values: torch.Generator, rows: int, tokens: int) -> dict[str, Tensor]:
    """Draw the embedding inputs that go with tokens; {} where the step takes no embeddings."""
    if not facts.embeds:
        return {}
    drawn = torch.randn(rows, tokens, facts.width, generator=values).to(facts.embeds_dtype)
    return {"inputs_embeds": drawn, "embedded": torch.randint(0, 2, (), generator=values).bool()}
