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
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK
from adaptc.generation.spec import EXACT_LENGTH, RECURRENT, UNCACHED, GenerationSpec

_MAX_SIZE = 7


def with_example_inputs(
    spec: GenerationSpec,
    device: torch.device,
    options: Mapping[str, Any],
    draw_inputs: Callable[..., dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Return the ``options`` of verify with drawn ``inputs`` in the place of the number ``shapes``; ``draw_inputs``
    draws each.

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
    made = [(draw_inputs or _draw_step)(spec, draw) for _ in range(count)]
    options["inputs"] = [{name: value.to(device) for name, value in inputs.items()} for inputs in made]
    return options


def _draw_size(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, max(low, high) + 1, (), generator=generator))


def draw_seq2seq_step(
    spec: Seq2SeqSpec,
    size_generator: torch.Generator,
    value_generator: torch.Generator | None = None,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Draw the inputs of an encoder-decoder's program: a step, and independent rows for the encoder.

    ``size_generator`` draws the sizes, and ``value_generator`` all else; None means ``size_generator``.
    """
    encoded_rows, value_generator = rows, size_generator if value_generator is None else value_generator
    renamed = {"input_ids", "attention_mask", "position_ids"}
    inputs = {
        f"decoder_{n}" if n in renamed else n: t
        for n, t in _draw_step(spec, size_generator, value_generator, rows).items()
    }
    rows = inputs["decoder_input_ids"].shape[0]
    encoded_rows, source_length = (
        _draw_size(size_generator, 1, _MAX_SIZE) if encoded_rows is None else encoded_rows,
        _draw_size(size_generator, 1, 2 * _MAX_SIZE),
    )
    if spec.feature_shape is None:
        source_length = min(source_length, spec.max_source_length or source_length)
        inputs[spec.main_input_name] = torch.randint(
            0, spec.vocab_size, (encoded_rows, source_length), generator=value_generator
        )
        inputs["attention_mask"] = torch.ones(encoded_rows, source_length, dtype=torch.int64)
        inputs[STATES_MASK] = torch.ones(rows, source_length, dtype=torch.int64)
    else:
        source_length = spec.feature_shape[-1] // (spec.conv_strides[0] * spec.conv_strides[1])
        inputs[spec.main_input_name] = torch.randn(encoded_rows, *spec.feature_shape, generator=value_generator).to(
            spec.embeds_dtype
        )
    inputs[STATES] = torch.randn(rows, source_length, spec.encoder_hidden_size, generator=value_generator).to(
        spec.cross_layout.dtype
    )
    for name, shape in zip(spec.cross_layout.names, spec.cross_layout.shapes(rows, source_length), strict=True):
        inputs[name] = torch.randn(shape, generator=value_generator).to(spec.cross_layout.dtype)
    return inputs


def draw_probe_steps(
    spec: Any, device: torch.device, draw_inputs: Callable[..., Any] | None = None
) -> list[dict[str, Tensor]]:
    """Draw the inputs of two steps of three rows, with equal sizes but different tokens and cache contents.

    ``draw_inputs`` draws each; None means the step of a causal model.
    """
    out = []
    for seed in (1, 2):
        sizes, values = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
        made = (draw_inputs or _draw_step)(spec, sizes, values, rows=3)
        if "embedded" in made:
            made["embedded"] = torch.tensor(False)
        out.append({name: value.to(device) for name, value in made.items()})
    return out


def _draw_step(
    spec: GenerationSpec,
    size_generator: torch.Generator,
    value_generator: torch.Generator | None = None,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Draw the inputs of a causal model's step.

    ``size_generator`` draws the sizes, and ``value_generator`` all else; None means ``size_generator``.
    """
    value_generator = size_generator if value_generator is None else value_generator

    def draw_size(low: int, high: int) -> int:
        return _draw_size(size_generator, low, high)

    rows = draw_size(1, min(spec.max_batch, _MAX_SIZE)) if rows is None else rows
    length = draw_size(1, min(spec.max_length, 2 * _MAX_SIZE))
    tokens = length if spec.cache_mode == UNCACHED else draw_size(1, min(length, _MAX_SIZE))
    before = length - tokens if spec.cache_mode == EXACT_LENGTH else draw_size(0, length - tokens)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, : before // 2] = 0
    slots = torch.arange(before, before + tokens)
    inputs = {
        "input_ids": torch.randint(0, spec.vocab_size, (rows, tokens), generator=value_generator),
        "attention_mask": mask,
        "keep": torch.arange(tokens - draw_size(1, tokens), tokens),
    }
    if spec.cache_mode == RECURRENT:
        seen = torch.randint(0, 2, (rows,), generator=value_generator).bool()
        states = spec.layout.zeros(rows, torch.device("cpu"))
        drawn = {n: torch.randn(t.shape, generator=value_generator).to(t.dtype) for n, t in states.items()}
        one = {"input_ids": inputs["input_ids"][:, :1].contiguous(), "seen": seen, **drawn}
        return one | _draw_embeddings(spec, value_generator, rows, 1)
    if spec.cache_mode != UNCACHED:
        inputs["slots"] = slots
    if spec.takes_position_ids:
        inputs["position_ids"] = slots.expand(rows, -1).contiguous()
    inputs |= _draw_embeddings(spec, value_generator, rows, tokens)
    for name in spec.token_gate_inputs:
        inputs[name] = torch.randint(0, 2, (rows, tokens), generator=value_generator).bool()
    ring = None if spec.sliding_window is None else min(length, spec.sliding_window + tokens - 1)
    for name, shape in zip(spec.layout.names, spec.layout.shapes(rows, length, ring), strict=True):
        inputs[name] = torch.randn(shape, generator=value_generator).to(spec.layout.dtype)
    return inputs


def _draw_embeddings(
    spec: GenerationSpec, value_generator: torch.Generator, rows: int, tokens: int
) -> dict[str, Tensor]:
    """Draw the embedding inputs that go with tokens; {} where the step takes no embeddings."""
    if not spec.takes_inputs_embeds:
        return {}
    drawn = torch.randn(rows, tokens, spec.hidden_size, generator=value_generator).to(spec.embeds_dtype)
    return {"inputs_embeds": drawn, "embedded": torch.randint(0, 2, (), generator=value_generator).bool()}
