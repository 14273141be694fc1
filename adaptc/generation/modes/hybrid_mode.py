"""Keep keys and values beside the states of a hybrid model such as Jamba, whose step reads one token.

Some layers of such a model attend to all tokens before, others have a state, and a layer may have both. Inside
:meth:`HybridMode.capture` its ``forward`` takes plain tensors alone. As for a state, a step reads one token; see
``prefill_part`` for prompts.

    input_ids       (batch, 1)         int64
    inputs_embeds   (batch, 1, width)  replaces the embeddings where ``embedded`` () is true; only where supported
    attention_mask  (batch, length)    int64, of the cache; a row whose token is masked keeps its states
    position_ids    (batch, 1)         int64; only where supported
    slots           (1,)               int64: the position of the cache that the token goes to
    keys_i          (batch, heads, length, dim)  and values_i, for each layer with attention
    state_i         (batch, ...)       each layer's states, written in place
    -> logits       (batch, 1, vocabulary)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import patch_forward
from adaptc.generation.cache.cache_layout import CacheLayout, HybridLayout
from adaptc.generation.cache.state_cache import HybridCache
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import refuse_token_gates
from adaptc.generation.modes.recurrent_mode import RecurrentMode, describe_reading, set_states, write_states
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import (
    StepExample,
    StepSpec,
    equate_sizes,
    example_step,
    find_cache_argument,
    replaced_embeddings,
    token_inputs,
    written_layer_class,
)
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.tables import format_bytes


class HybridMode(RecurrentMode):
    """The mode of a state beside keys and values, from which one token after another is computed."""

    name = "hybrid"
    step_name = "a step with its states, keys and values"
    takes_slots = True
    layout_type = HybridLayout
    cache_type = HybridCache

    @contextlib.contextmanager
    def capture(
        self,
        model: nn.Module,
        layout: CacheLayout,
        size_limit: int | None = None,
        token_gate_inputs: Sequence[str] = (),
    ) -> Generator[StepExample]:
        refuse_token_gates(token_gate_inputs, f"{type(model).__name__} would generate from a state")
        assert isinstance(layout, HybridLayout)
        cache_argument, takes = find_cache_argument(model, "cache_params"), inspect.signature(model.forward).parameters
        step = _example_step(model, layout, "position_ids" in takes, "inputs_embeds" in takes)
        original = model.forward

        def forward(**inputs: Any) -> Tensor:
            equate_sizes(inputs, step.dynamic_shapes)
            tensors, slots = [inputs.pop(n) for n in layout.names], inputs.pop("slots")
            given = inputs.pop("inputs_embeds", None), inputs.pop("embedded", None)
            # The model writes to the states that it is given, and rows without a token must keep them.
            made = [t.clone() if is_state else t for t, is_state in zip(tensors, layout.is_state, strict=True)]
            inputs[cache_argument] = _cache_over_tensors(layout, made, slots)
            seen = inputs["attention_mask"].index_select(1, slots).squeeze(1).bool()
            with replaced_embeddings(model, *given):
                logits = original(**inputs, use_cache=True).logits
            first = 2 * len(layout.layers)
            write_states(tensors[first:], made[first:], seen)
            return logits

        with patch_forward(model, forward, step.parameters), packed_attention():
            yield step

    def check_inputs(
        self, spec: StepSpec, ids: Tensor, mask: Tensor, positions: Tensor, *, is_whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        (rows, length), device = ids.shape, ids.device
        cached = spec.layout.zeros(rows, device, length + 3)
        wide = torch.cat([mask, mask.new_ones(rows, 3)], 1)
        for i in range(length):
            inputs = token_inputs(spec, device, ids[:, i : i + 1], None, rows, 1)
            if spec.takes_position_ids:
                inputs["position_ids"] = spec.step_positions(positions[..., i : i + 1])
            yield {**inputs, "attention_mask": wide, "slots": torch.tensor([i], device=device), **cached}

    def _inputs_of_token(self, past: StepCache, position: int) -> dict[str, Tensor]:
        return {"attention_mask": past.mask, "slots": torch.tensor([position], device=past.device)}

    def describe(self, spec: StepSpec) -> list[str]:
        passes = f" in {spec.layout.passes} passes" if spec.layout.passes > 1 else ""
        state = spec.layout.nbytes(1, 0)
        each = format_bytes(spec.layout.nbytes(1, 1) - state)
        sizes = f"{each} for each row and position, and a state of {format_bytes(state)} for each row"
        return [f"cache{passes}: {sizes}; {describe_reading(spec)}"]

    def draw_further_inputs(
        self, spec: StepSpec, draw: StepDraw, inputs: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        token = super().draw_further_inputs(spec, draw, inputs, slots)
        del token["seen"]
        token |= {"attention_mask": inputs["attention_mask"], "slots": slots[:1]}
        if spec.takes_position_ids:
            token["position_ids"] = spec.step_positions(slots[:1].expand(len(token["input_ids"]), -1))
        return token


def _example_step(model: Any, layout: HybridLayout, with_position_ids: bool, with_embeds: bool) -> StepExample:
    """Return the example inputs of a step, and their free sizes: rows, and positions of the cache."""
    step = example_step(model, layout, with_position_ids, with_embeds)
    inputs, shapes = dict(step.example_inputs), dict(step.dynamic_shapes)
    del inputs["keep"], shapes["keep"]
    for name in ("input_ids", "position_ids", "slots", "inputs_embeds"):
        if name in inputs:
            axis = 0 if name == "slots" else 1
            inputs[name] = inputs[name].narrow(axis, 0, 1).contiguous()
            shapes[name] = {i: dim for i, dim in shapes[name].items() if i != axis}
    for name, is_state in zip(layout.names, layout.is_state, strict=True):
        if is_state:
            shapes[name] = {0: shapes[name][0]}
    return StepExample(inputs, shapes)


def _cache_over_tensors(layout: HybridLayout, tensors: Sequence[Tensor], slots: Tensor) -> Any:
    """Return a transformers cache on ``tensors`` that counts as already begun, and writes keys and values at
    ``slots``."""
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer

    state_layer: Any = LinearAttentionLayer  # its types leave out what its keywords are
    first = 2 * len(layout.layers)
    states = list(zip(layout.states, tensors[first:], strict=True))
    layers: list[Any] = []
    for i in layout.layer_numbers:
        own = [pair for pair in states if pair[0].layer == i]
        if i in layout.attention_layers:
            number = layout.attention_layers.index(i)
            given = *tensors[2 * number : 2 * number + 2], slots, layout.layers[number].sliding is not None, False
            layer: Any = _hybrid_layer_class()(*given) if own else written_layer_class()(*given)
        else:
            layer = state_layer() if own else DummyLayer()
        if own:
            state_layer.__init__(layer, number_of_states=layout.states_per_kind(i))
            set_states(layer, own)
        layers.append(layer)
    return _hybrid_cache_class()(layers, slots)


@cache
def _hybrid_cache_class() -> type:
    from transformers.cache_utils import Cache

    class WrittenHybridCache(Cache):
        """A cache whose length is the first position that is written, whatever the layer that a model asks."""

        def __init__(self, layers: list[Any], slots: Tensor) -> None:
            super().__init__(layers=layers)
            self.slots = slots

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return self.slots[0]

    return WrittenHybridCache


@cache
def _hybrid_layer_class() -> type:
    from transformers.cache_utils import LinearAttentionLayer

    written: Any = written_layer_class()

    class WrittenHybridLayer(LinearAttentionLayer, written):
        """A layer over given keys and values that has states, too."""

        def __init__(self, *given: Any) -> None:
            written.__init__(self, *given)

    return WrittenHybridLayer
