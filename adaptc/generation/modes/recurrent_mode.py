"""Keep the states of a recurrent model such as Mamba, whose step reads one token and writes the states after it.

The model's layers keep the last inputs of a convolution and the state of a recurrence. Inside
:meth:`RecurrentMode.capture` its ``forward`` takes plain tensors alone. A step reads one token: for
several it would be a loop, which a capture unrolls for one fixed number of them. See ``prefill_part`` for prompts.

    input_ids      (batch, 1)         int64
    inputs_embeds  (batch, 1, width)  replaces the embeddings where ``embedded`` () is true; both only where supported
    seen           (batch,)           bool: rows whose token counts; the states of all others stay as they were
    state_i        (batch, ...)       each layer's states, written in place
    -> logits      (batch, 1, vocabulary)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.model_state import patch_forward
from adaptc.generation.cache.cache_layout import CacheLayout, State, StateLayout
from adaptc.generation.cache.state_cache import StateCache
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import refuse_token_gates
from adaptc.generation.modes.cache_mode import CacheMode, Inputs, StepFunction
from adaptc.generation.modes.chunked_prefill import last_token_indices
from adaptc.generation.modes.static_step import (
    StepExample,
    StepSpec,
    find_cache_argument,
    replaced_embeddings,
    token_inputs,
)
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.tables import format_bytes
from adaptc.torch_typing import to_python

_ROWS = 3


class RecurrentMode(CacheMode):
    """The mode of a state, from which one token after another is computed."""

    name = "state"
    step_name = "a step with its state"
    text_manner = "token by token"
    can_take_back = False
    takes_slots = False
    layout_type: ClassVar[type[CacheLayout]] = StateLayout
    cache_type: ClassVar[type[StepCache]] = StateCache

    @contextlib.contextmanager
    def capture(
        self,
        model: nn.Module,
        layout: CacheLayout,
        size_limit: int | None = None,
        token_gate_inputs: Sequence[str] = (),
    ) -> Generator[StepExample]:
        refuse_token_gates(token_gate_inputs, f"{type(model).__name__} would generate from a state")
        assert isinstance(layout, StateLayout)
        cache_argument, takes = find_cache_argument(model, "cache_params"), inspect.signature(model.forward).parameters
        step, original = _example_step(model, layout, "inputs_embeds" in takes), model.forward

        def forward(
            input_ids: Tensor,
            seen: Tensor,
            inputs_embeds: Tensor | None = None,
            embedded: Tensor | None = None,
            **states: Tensor,
        ) -> Tensor:
            # The model writes to the tensors that it is given, and rows without a token must keep their states.
            made = [states[name].clone() for name in layout.names]
            caches = {cache_argument: _cache_over_states(layout, made)}
            with replaced_embeddings(model, inputs_embeds, embedded):
                logits = original(input_ids=input_ids, use_cache=True, **caches).logits
            write_states([states[name] for name in layout.names], made, seen)
            return logits

        with patch_forward(model, forward, step.parameters):
            yield step

    def check_inputs(
        self, spec: StepSpec, ids: Tensor, mask: Tensor, positions: Tensor, *, is_whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        rows, length = ids.shape
        states = spec.layout.zeros(rows, ids.device)
        for i in range(length):
            token = token_inputs(spec, ids.device, ids[:, i : i + 1], None, rows, 1)
            yield {**token, "seen": mask[:, i].bool(), **states}

    def run(
        self, step: StepFunction, past: StepCache, inputs: Inputs, tokens: int, logits_to_keep: int | Tensor
    ) -> Tensor:
        cached_length = past.length
        logit_indices = to_python(last_token_indices(logits_to_keep, tokens, torch.device("cpu")))
        wanted = set(logit_indices)
        states = dict(zip(past.layout.names, past.tensors, strict=True))
        logits: dict[int, Tensor] = {}
        for i in range(tokens):
            one = {n: t[:, i : i + 1].contiguous() if t.ndim > 1 else t for n, t in inputs.items()}
            past.begin_write(cached_length + i + 1)
            found = step(**one, **self._inputs_of_token(past, cached_length + i), **states)
            past.end_write(cached_length + i + 1)
            if i in wanted:
                logits[i] = found
        return torch.cat([logits[i] for i in logit_indices], 1)

    def _inputs_of_token(self, past: StepCache, position: int) -> dict[str, Tensor]:
        """Return the inputs of a step for the token at ``position``, beside the token itself and the cache's
        tensors."""
        return {"seen": past.mask[:, position].bool()}

    def pad_prefix(self, tensor: Tensor, count: int) -> Tensor:
        """Return the state ``tensor`` as it is: no position of it is empty."""
        return tensor

    def describe(self, spec: StepSpec) -> list[str]:
        passes = f" in {spec.layout.passes} passes" if spec.layout.passes > 1 else ""
        size = format_bytes(spec.layout.nbytes(1, 0))
        return [f"state{passes}: {size} for each row; {describe_reading(spec)}"]

    def draw_further_inputs(
        self, spec: StepSpec, draw: StepDraw, inputs: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        rows = inputs["input_ids"].shape[0]
        seen, length = draw.booleans((rows,)), inputs["attention_mask"].shape[1]
        states = spec.layout.zeros(rows, torch.device("cpu"), length)
        drawn = {n: draw.normal(t.shape, t.dtype) for n, t in states.items()}
        token = {"input_ids": inputs["input_ids"][:, :1].contiguous(), "seen": seen, **drawn}
        return token | draw.embeddings(spec, rows, 1)


def _example_step(model: Any, layout: StateLayout, with_embeds: bool) -> StepExample:
    device, rows = next(model.parameters()).device, Dim("rows")
    inputs = {
        "input_ids": torch.arange(_ROWS, device=device)[:, None].contiguous(),
        "seen": torch.ones(_ROWS, dtype=torch.bool, device=device),
        **layout.zeros(_ROWS, device),
    }
    shapes: dict[str, Any] = {name: {0: rows} for name in inputs}
    if with_embeds:
        weight = model.get_input_embeddings().weight
        inputs["inputs_embeds"] = torch.zeros(_ROWS, 1, weight.shape[1], dtype=weight.dtype, device=device)
        inputs["embedded"] = torch.zeros((), dtype=torch.bool, device=device)
        shapes |= {"inputs_embeds": {0: rows}, "embedded": {}}
    return StepExample(inputs, shapes)


def describe_reading(spec: StepSpec) -> str:
    """Return how a prompt is read, for reports."""
    if spec.has_prefill and spec.layout.passes == 1:
        return "a prompt is read at once"
    reason = "in two passes, as the adapter asks" if spec.has_prefill else spec.prefill_reason
    return "a prompt is read token by token" + (f" ({reason})" if reason else "")


def write_states(states: Sequence[Tensor], new: Sequence[Tensor], seen: Tensor) -> None:
    """Write the ``new`` states in place, in the rows where ``seen`` (rows,) is true."""
    for old, made in zip(states, new, strict=True):
        old.copy_(torch.where(seen.view(-1, *[1] * (made.ndim - 1)), made, old))


def set_states(layer: Any, states: Sequence[tuple[State, Tensor]]) -> None:
    """Let a layer of a transformers cache keep these states, and count as already begun."""
    for state, tensor in states:
        getattr(layer, state.kind)[state.index] = tensor
        getattr(layer, f"is_{state.kind}_initialized")[state.index] = True
        layer.has_previous_state[state.index] = True
        if state.kind == "conv_states":
            layer.conv_kernel_size[state.index] = tensor.shape[-1]
        layer.dtype, layer.device = tensor.dtype, tensor.device


def _cache_over_states(layout: StateLayout, tensors: Sequence[Tensor]) -> Any:
    """Return a transformers cache on ``tensors`` that counts as already begun."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    layers: list[Any] = []
    for i in layout.layer_numbers:
        layers.append(LinearAttentionLayer(number_of_states=layout.states_per_kind(i)))
        set_states(layers[-1], [pair for pair in zip(layout.states, tensors, strict=True) if pair[0].layer == i])
    return Cache(layers=layers)
