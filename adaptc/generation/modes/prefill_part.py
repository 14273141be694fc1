"""Read a prompt at once into the states of a model whose step reads one token, as a second part of its program.

A recurrent or hybrid model computes a whole text at once where it begins with nothing. Inside
:func:`captured_with_prefill` a model's ``forward`` computes both, on the same weights:

    prefill  prefill_input_ids (rows, length), prefill_attention_mask (rows, length), prefill_keep (kept,),
             prefill_position_ids, prefill_inputs_embeds and prefill_embedded where the step takes such
             -> prefill_logits (rows, kept, vocabulary); prefill_keys_i and prefill_values_i (rows, heads, length, dim),
             and prefill_state_i (rows, ...), the states after the prompt
    step     the inputs of a step (see ``recurrent_mode``, ``hybrid_mode``) -> logits

A generation runs the first part for the prompt that begins a cache. All other tokens are read by steps, one by one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols

from adaptc.capture.model_state import patch_forward
from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout, HybridLayout, StateLayout
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.chunked_prefill import last_token_indices
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import (
    StepExample,
    StepSpec,
    equate_sizes,
    find_cache_argument,
    replaced_embeddings,
)
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.passes.graph.lifted import user_inputs
from adaptc.state.runner import ProgramPart

PREFILL, STEP = "prefill", "step"
_PREFIX = "prefill_"
LOGITS = f"{_PREFIX}logits"
#: the inputs of a step that the prefill part has, too, under names of its own
_SHARED_INPUTS = ("input_ids", "attention_mask", "position_ids", "keep", "inputs_embeds", "embedded")
#: the fewest tokens that are read at once; torch takes a size of one for a constant
MIN_TOKENS = 2
#: sizes of the example inputs: different from those of a step, and none of them one
_LENGTH, _KEPT = 7, 2
T = TypeVar("T")


def part_outputs(layout: CacheLayout) -> Mapping[str, Sequence[str]]:
    """Return the outputs of each part of a program with a prefill part, by the part's name."""
    return {PREFILL: [LOGITS, *map(prefill_name, layout.with_passes(1).names)], STEP: ["logits"]}


def prefill_name(name: str) -> str:
    """Return the name in the prefill part of an input of a step, or of what it writes to a tensor of the cache."""
    return f"{_PREFIX}{name}"


@contextlib.contextmanager
def captured_with_prefill(
    model: nn.Module, layout: CacheLayout, capture_step: Callable[[], AbstractContextManager[StepExample]]
) -> Generator[StepExample]:
    """Run the block with ``model`` as the two parts of its program; its own forward is restored afterwards.

    ``capture_step()`` is the context of the step alone. Raises CaptureError for a model whose forward takes no
    attention_mask, since it would read padding.
    """
    assert isinstance(layout, StateLayout)
    original, takes = model.forward, inspect.signature(model.forward).parameters
    cache_argument = find_cache_argument(model, "cache_params")
    if "attention_mask" not in takes:
        raise CaptureError(f"the forward of {type(model).__name__} takes no attention_mask")
    takes_logits_to_keep = "logits_to_keep" in takes
    with capture_step() as step:
        step_forward = model.forward
        inputs, shapes = _example_prompt(step)
        both = StepExample({**inputs, **step.example_inputs}, {**shapes, **step.dynamic_shapes})

        def forward(**inputs: Any) -> dict[str, Tensor]:
            equate_sizes(inputs, both.dynamic_shapes)
            prompt = {n.removeprefix(_PREFIX): inputs.pop(n) for n in list(inputs) if n.startswith(_PREFIX)}
            keep = prompt.pop("keep")
            given = prompt.pop("inputs_embeds", None), prompt.pop("embedded", None)
            if takes_logits_to_keep:
                prompt["logits_to_keep"] = keep
            made = _empty_cache(layout)
            prompt[cache_argument] = made
            with replaced_embeddings(model, *given):
                logits = original(**prompt, use_cache=True).logits
            found = dict(zip(map(prefill_name, layout.names), written_tensors(layout, made), strict=True))
            return {
                LOGITS: logits if takes_logits_to_keep else logits[:, keep],
                **found,
                "logits": step_forward(**inputs),
            }

        with patch_forward(model, forward, both.parameters), packed_attention():
            yield both


def check_prefill_sizes(program: ExportedProgram, model_name: str, max_length: int) -> None:
    """Raise CaptureError where a captured prefill part takes only some lengths of prompts."""
    length = user_inputs(program)[prefill_name("input_ids")].shape[1]
    symbols = free_symbols(length)
    if not symbols:
        raise CaptureError(f"{model_name} was captured for prompts of {length} tokens alone")
    untyped: Any = program  # the types of its ranges are not complete
    limits = untyped.range_constraints.get(next(iter(symbols)))
    if limits is not None and (limits.lower > MIN_TOKENS or limits.upper < max_length):
        raise CaptureError(f"{model_name} was captured for prompts of {limits.lower} to {limits.upper} tokens alone")


def prompt_inputs(layout: CacheLayout, inputs: Mapping[str, T]) -> dict[str, T]:
    """Return the inputs of the prefill part, for those of a step of all its tokens; adapters' own keep their names."""
    return {prefill_name(n) if n in _SHARED_INPUTS else n: t for n, t in inputs.items() if n not in layout.names}


def prompt_input_names(spec: StepSpec) -> list[str]:
    """Return the names of the prefill part's inputs, without those of adapters."""
    flags = {"position_ids": spec.takes_position_ids, "inputs_embeds": spec.takes_inputs_embeds}
    flags["embedded"] = spec.takes_inputs_embeds
    return [prefill_name(n) for n in _SHARED_INPUTS if flags.get(n, True)]


def draw_prompt(spec: StepSpec, draw: StepDraw, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draw the inputs of the prefill part, for as many rows as the inputs ``step`` of a step have."""
    rows = step["input_ids"].shape[0]
    tokens = draw.size(MIN_TOKENS, max(MIN_TOKENS, min(spec.max_length, draw.max_size)))
    inputs = draw.text(spec.vocab_size, rows, tokens, tokens, padding=tokens // 3)
    inputs |= draw.embeddings(spec, rows, tokens)
    if spec.takes_position_ids:
        inputs["position_ids"] = spec.step_positions((inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    return prompt_inputs(spec.layout, inputs)


def can_prefill(spec: StepSpec, past: StepCache, tokens: int) -> bool:
    """Return whether the next ``tokens`` tokens can be read at once into ``past``, which has their mask.

    They begin the cache, and only the first tokens of a row are padding.
    """
    if spec.layout.passes > 1 or past.length or tokens < MIN_TOKENS:
        return False
    mask = past.mask[:, :tokens].bool()
    return bool((mask[:, 1:] | ~mask[:, :-1]).all() & mask[:, -1].all())


def run_step_part(part: ProgramPart, **inputs: Tensor) -> Tensor:
    """Run the part of a program that is its step; returns the logits (batch, kept, vocabulary)."""
    return part.run(**{name: inputs[name] for name in part.inputs})["logits"]


def run_prefill(
    part: ProgramPart, past: StepCache, inputs: Mapping[str, Tensor], tokens: int, logits_to_keep: int | Tensor
) -> Tensor:
    """Read ``tokens`` tokens at once into ``past``, which is empty; returns the logits (batch, kept, vocabulary).

    ``inputs`` and ``logits_to_keep`` are as for :meth:`CacheMode.run`.
    """
    keep = last_token_indices(logits_to_keep, tokens, past.device)
    prompt = {**inputs, "attention_mask": past.mask[:, :tokens].contiguous(), "keep": keep}
    named = prompt_inputs(past.layout, prompt)
    found = part.run(**{name: named[name].contiguous() for name in part.inputs})
    past.begin_write(tokens)
    for name, tensor in zip(past.layout.names, past.tensors, strict=True):
        value = found[prefill_name(name)]
        (tensor if value.shape == tensor.shape else tensor.narrow(2, 0, tokens)).copy_(value)
    past.end_write(tokens)
    return found[LOGITS]


def _example_prompt(step: StepExample) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Return the example inputs of the prefill part and their free sizes; its rows are those of ``step``."""
    ids = step.example_inputs["input_ids"]
    rows, rows_dim, device = ids.shape[0], step.dynamic_shapes["input_ids"][0], ids.device
    length, kept = Dim("prompt_length"), Dim("prompt_kept")
    places = torch.arange(_LENGTH, device=device).expand(rows, _LENGTH).contiguous()
    inputs = {
        "input_ids": places,
        "attention_mask": torch.ones_like(places),
        "keep": torch.arange(_KEPT, device=device) + 1,
    }
    per_token = {0: rows_dim, 1: length}
    shapes: dict[str, dict[int, Any]] = {"input_ids": per_token, "attention_mask": per_token, "keep": {0: kept}}
    if "position_ids" in step.example_inputs:
        inputs["position_ids"], shapes["position_ids"] = places.clone(), per_token
    if (embeds := step.example_inputs.get("inputs_embeds")) is not None:
        inputs["inputs_embeds"] = embeds.repeat(1, _LENGTH, 1)
        inputs["embedded"] = step.example_inputs["embedded"].clone()
        shapes |= {"inputs_embeds": per_token, "embedded": {}}
    return {prefill_name(n): t for n, t in inputs.items()}, {prefill_name(n): s for n, s in shapes.items()}


def _empty_cache(layout: StateLayout) -> Any:
    """Return an empty transformers cache with layers for this layout, which note what the model writes to them."""
    from transformers.cache_utils import Cache, DummyLayer

    states, keys, both = _noting_layers()
    layers: list[Any] = []
    for i in layout.layer_numbers:
        sizes = {(s.kind, s.index): s.sizes for s in layout.states if s.layer == i}
        if isinstance(layout, HybridLayout) and i in layout.attention_layers:
            is_sliding = layout.layers[layout.attention_layers.index(i)].sliding is not None
            layers.append(both(sizes, is_sliding) if sizes else keys(is_sliding))
        else:
            layers.append(states(sizes) if sizes else DummyLayer())
    return Cache(layers=layers)


def written_tensors(layout: StateLayout, made: Any) -> list[Tensor]:
    """Return what a model wrote to the cache ``made``, in the order of ``layout.names``.

    Raises CaptureError where it left out a tensor.
    """
    found: list[Tensor | None] = []
    if isinstance(layout, HybridLayout):
        for i in layout.attention_layers:
            found += [made.layers[i].keys, made.layers[i].values]
    found += [getattr(made.layers[s.layer], s.kind)[s.index] for s in layout.states]
    tensors = [t for t in found if t is not None]
    if len(tensors) < len(found):
        raise CaptureError("the model does not write to each tensor of an empty cache")
    return tensors


@cache
def _noting_layers() -> tuple[Any, Any, Any]:
    """Return the classes of an empty cache's layers: with states, with keys and values, and with both."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

    state_layer: Any = LinearAttentionLayer  # their types leave out what their keywords are
    key_layer: Any = DynamicLayer

    class StateNotes(state_layer):
        """A layer of states that are zeros before the prompt. ``sizes`` are those of a state, by kind and index."""

        def __init__(self, sizes: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
            state_layer.__init__(self, number_of_states=1 + max(index for _, index in sizes))
            self.sizes = sizes

        def update_conv_state(
            self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
        ) -> Tensor:
            # Zeros before the text in any case, so that short texts need no branch.
            width = self.sizes["conv_states", state_idx][-1]
            whole = torch.cat([conv_states.new_zeros(*conv_states.shape[:-1], width), conv_states], -1)
            self.conv_states[state_idx] = whole.narrow(-1, conv_states.shape[-1], width)
            return conv_states if conv_kernel_size is None else whole

        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    class KeyNotes(key_layer):
        """A layer of the keys and values of the prompt alone."""

        def __init__(self, is_sliding: bool) -> None:
            key_layer.__init__(self)
            self.is_sliding = is_sliding

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.keys, self.values = key_states, value_states
            return key_states, value_states

        def get_seq_length(self) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
            return query_length, 0

    class Notes(StateNotes, KeyNotes):
        """A layer of both."""

        def __init__(self, sizes: Mapping[tuple[str, int], tuple[int, ...]], is_sliding: bool) -> None:
            KeyNotes.__init__(self, is_sliding)
            StateNotes.__init__(self, sizes)

    return StateNotes, KeyNotes, Notes
