"""Turn a recurrent model such as Mamba into its step: one token, and the states after it.

The model's layers keep the last inputs of a convolution and the state of a recurrence. Inside
:func:`captured_as_state_step` its ``forward`` takes plain tensors alone. A text is read token by token: a step of
several tokens would be a loop, which a capture unrolls for one fixed number of them.

    input_ids      (batch, 1)         int64
    inputs_embeds  (batch, 1, width)  replaces the embeddings where ``embedded`` () is true; both only where supported
    seen           (batch,)           bool: rows whose token counts; the states of all others stay as they were
    state_i        (batch, ...)       each layer's states, written in place
    -> logits      (batch, 1, vocabulary)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.model_state import keyword_only_parameter, patch_forward
from adaptc.errors import AdaptcError, CaptureError
from adaptc.generation.cache.cache_layout import StateLayout
from adaptc.generation.cache.sliding_window import RingRange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.static_step import StepExample, replaced_embeddings

_ROWS = 3


@contextlib.contextmanager
def captured_as_state_step(model: nn.Module, layout: StateLayout) -> Iterator[StepExample]:
    """Run the block with ``model`` as its step; its own forward is restored afterwards.

    Raises CaptureError for a model whose forward takes no cache.
    """
    takes = inspect.signature(model.forward).parameters
    cache_argument = next((n for n in ("cache", "cache_params", "past_key_values") if n in takes), None)
    if cache_argument is None:
        raise CaptureError(f"the forward of {type(model).__name__} takes no cache, so it cannot go on from one")
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
        with replaced_embeddings(model, inputs_embeds, embedded):
            logits = original(
                input_ids=input_ids, use_cache=True, **{cache_argument: _cache_over_states(layout, made)}
            ).logits
        for name, new in zip(layout.names, made, strict=True):
            old = states[name]
            old.copy_(torch.where(seen.view(-1, *[1] * (new.ndim - 1)), new, old))
        return logits

    with patch_forward(model, forward, list(map(keyword_only_parameter, step.example_inputs))):
        yield step


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


def _cache_over_states(layout: StateLayout, tensors: list[Tensor]) -> Any:
    """Return a transformers cache on ``tensors`` that counts as already begun."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    layers: list[Any] = []
    for state, tensor in zip(layout.states, tensors, strict=True):
        if state.layer == len(layers):
            layers.append(LinearAttentionLayer(number_of_states=layout.states_per_kind(state.layer)))
        layer = layers[state.layer]
        getattr(layer, state.kind)[state.index] = tensor
        getattr(layer, f"is_{state.kind}_initialized")[state.index] = True
        layer.has_previous_state[state.index] = True
        if state.kind == "conv_states":
            layer.conv_kernel_size[state.index] = tensor.shape[-1]
        layer.dtype, layer.device = tensor.dtype, tensor.device
    return Cache(layers=layers)


def run_token_by_token(
    step: Callable[..., Any], past: StepCache, inputs: Mapping[str, Tensor], tokens: int, logits_to_keep: int | Tensor
) -> Tensor:
    """Read new tokens one at a time, with the states in ``past``; returns the logits that ``logits_to_keep`` asks for.

    The arguments are those of :func:`run_chunked`.
    """
    cached_length = past.length
    logit_indices = (
        range(max(tokens - logits_to_keep, 0) if logits_to_keep else 0, tokens)
        if isinstance(logits_to_keep, int)
        else logits_to_keep.tolist()
    )
    states = dict(zip(past.layout.names, past.tensors, strict=True))
    logits: dict[int, Tensor] = {}
    for i in range(tokens):
        one = {n: t[:, i : i + 1].contiguous() if t.ndim > 1 else t for n, t in inputs.items()}
        past.begin_write(cached_length + i + 1)
        found = step(**one, seen=past.mask[:, cached_length + i].bool(), **states)
        past.end_write(cached_length + i + 1)
        if i in logit_indices:
            logits[i] = found
    return torch.cat([logits[i] for i in logit_indices], 1)


class StateCache(StepCache):
    """A cache of the states after a text, whose size no length changes; no token can be taken back."""

    layout: StateLayout  # type: ignore[assignment]

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return self.layout.states[-1].layer + 1

    def reserve(self, rows: int, length: int) -> None:
        if not self.tensors:
            self.rows = rows
            if self.prefix is not None:
                self._allocate_prefix(rows)
            else:
                self._set_attributes(
                    tensors=list(self.layout.zeros(rows, self.device).values()), ring_range=RingRange()
                )
        if length > self.mask.shape[1]:
            wider = torch.ones(rows, min(max(2 * length, 64), self.max_length), dtype=torch.int64, device=self.device)
            if self.length:
                wider[:, : self.length] = self.mask[:, : self.length]
            self.mask = wider

    def filled_tensors(self) -> list[Tensor]:
        return list(self.tensors)

    @property
    def is_intact(self) -> bool:
        return self.ring_high_water <= self.length

    def can_crop(self, length: int) -> bool:
        return length in (0, self.prefix_length, self.length)

    def check_crop(self, new_length: int) -> None:
        if not self.can_crop(new_length):
            raise AdaptcError(
                f"a state of {self.length} positions cannot be taken back to {new_length}: compute the text again with "
                "gen.prefill(input_ids), and keep copies of what you go on from"
            )

    def crop(self, tokens_to_remove: int) -> None:
        left = min(self.length, tokens_to_remove) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        self.check_crop(left)
        if left <= self.prefix_length:
            self.reset()

    def _empty_attributes(self) -> dict[str, Any]:
        return {"tensors": [torch.zeros_like(t) for t in self.tensors]}

    def last_position(self) -> list[Tensor]:
        return []  # no token of a state cache is computed again


@cache
def state_cache_class() -> type:
    """Return :class:`StateCache` as a subclass of ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    return type("StateCache", (StateCache, Cache), {"__module__": __name__, "__hash__": object.__hash__})
