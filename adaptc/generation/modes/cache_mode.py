"""Define what a cache mode decides: how a step is captured and called, and what it keeps of earlier tokens.

Each mode is one file of this folder, and ``all_modes`` lists them. No code elsewhere asks which mode a program has: it
calls the mode, or reads one of the attributes below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.step_cache import StepCache, as_transformers_cache
from adaptc.generation.modes.static_step import StepExample, StepSpec
from adaptc.generation.modes.step_draw import StepDraw

#: computes the logits (batch, kept, vocabulary) from the inputs of a step program, by name
StepFunction = Callable[..., Tensor]
Inputs = Mapping[str, Tensor]


class CacheMode(ABC):
    """A way in which a step knows the tokens before its own.

    A mode has no state: all facts of a program are in its ``spec``.
    """

    #: the name of the mode in files of programs, which never changes
    name: ClassVar[str]
    #: what a step of this mode is called in the log and in errors
    step_name: ClassVar[str]
    #: how such a step takes a text, for the error where its logits differ from the model's
    text_manner: ClassVar[str]
    #: whether a step continues from what earlier steps computed; else it computes the whole text
    has_cache: ClassVar[bool] = True
    #: whether the last tokens can be taken back, as assisted decoding does
    can_take_back: ClassVar[bool] = True
    #: whether a step takes ``slots``, the positions that its tokens go to
    takes_slots: ClassVar[bool] = True
    layout_type: ClassVar[type[CacheLayout]] = CacheLayout
    cache_type: ClassVar[type[StepCache]] = StepCache

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    # -- capture -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def capture(
        self,
        model: nn.Module,
        layout: CacheLayout,
        size_limit: int | None = None,
        token_gate_inputs: Sequence[str] = (),
    ) -> AbstractContextManager[StepExample]:
        """Return a context in which ``model`` has the forward of its step; its own is restored afterwards.

        ``size_limit`` bounds the positions of tokens and cache; None for any number. ``token_gate_inputs`` names inputs
        that only adapters read. Raises CaptureError for a model whose forward lacks what the mode needs, and
        ConfigError for ``token_gate_inputs`` where the step has no keys and values.
        """

    @abstractmethod
    def check_inputs(
        self, spec: StepSpec, ids: Tensor, mask: Tensor, positions: Tensor, *, is_whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of the steps that read a text, whose logits are wanted for all tokens.

        ``ids``, ``mask`` and ``positions`` are (batch, tokens). ``is_whole`` asks for one step, in modes that have
        steps of several tokens. Each step must run before the next inputs are asked
        for, because it writes to the cache that is among them.
        """

    # -- calls ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def run(
        self, step: StepFunction, past: StepCache, inputs: Inputs, tokens: int, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Run ``step`` on ``tokens`` new tokens, write them to ``past``, and return the logits.

        These are (batch, kept, vocabulary). ``inputs`` are tensors with the tokens along axis 1, or with fewer than two
        axes. ``logits_to_keep`` is the number of last tokens whose logits are wanted, 0 for all, or a tensor of token
        indices.
        """

    def new_cache(self, spec: StepSpec, device: torch.device, prefix: CachePrefix | None = None) -> StepCache:
        """Return a cache that holds nothing but ``prefix``."""
        made: StepCache = as_transformers_cache(self.cache_type)(
            self.cache_layout(spec), spec, spec.max_length, device, self.ring_window(spec.layout)
        )
        if prefix is not None:
            made.start_with_prefix(prefix)
        return made

    def cache_layout(self, spec: StepSpec) -> CacheLayout:
        return spec.layout

    def ring_window(self, layout: CacheLayout) -> int | None:
        """Return the size of the sliding window that the cache's rings keep; None where all positions are kept."""
        return None

    # -- virtual tokens ------------------------------------------------------------------------------------------------

    def join_prefixes(
        self, prefixes: Mapping[str, CachePrefix], rows: Mapping[str, Sequence[int]], count: int
    ) -> CachePrefix:
        """Return one prefix for ``count`` rows, of which ``rows[name]`` begin with ``prefixes[name]``.

        Rows with fewer virtual tokens than the longest prefix have empty positions before them.
        """
        longest, first = max(one.count for one in prefixes.values()), next(iter(prefixes.values()))
        padded = {
            name: [self.pad_prefix(t, longest - one.count) for t in one.tensors] for name, one in prefixes.items()
        }
        left_padding = torch.full((count,), longest, device=first.tensors[0].device)
        tensors = [t.new_zeros(count, *t.shape[1:]) for t in next(iter(padded.values()))]
        for name, own in padded.items():
            index = torch.tensor(rows[name], device=left_padding.device)
            left_padding[index] = longest - prefixes[name].count
            for made, tensor in zip(tensors, own, strict=True):
                made[index] = tensor.expand(len(index), *tensor.shape[1:])
        return CachePrefix(tensors, longest, first.counts_padding, left_padding)

    def pad_prefix(self, tensor: Tensor, count: int) -> Tensor:
        """Return keys or values (rows, heads, length, dim) with ``count`` empty positions before them."""
        return pad(tensor, (0, 0, count, 0))

    # -- what files and reports say ------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, spec: StepSpec) -> list[str]:
        """Return the lines of a report about the cache."""

    def misfit(self, layout: CacheLayout, inputs: Collection[str]) -> str:
        """Return why no program with these ``inputs`` and ``layout`` has this mode; '' where it may."""
        if type(layout) is not self.layout_type or self.has_cache != bool(layout.names):
            return f"what it keeps is {self.name!r}, of {len(layout.layers)} layers"
        return "" if self.takes_slots == ("slots" in inputs) else "its program has no such cache"

    # -- random inputs -------------------------------------------------------------------------------------------------

    def draw_step(self, spec: StepSpec, draw: StepDraw, rows: int | None = None) -> dict[str, Tensor]:
        """Draw the inputs of a step, with tokens in its cache; ``rows`` None for any number of them."""
        rows = draw.rows(spec.max_batch) if rows is None else rows
        length = draw.size(1, min(spec.max_length, 2 * draw.max_size))
        start, tokens = self.draw_span(draw, length)
        inputs = draw.text(spec.vocab_size, rows, tokens, length, padding=start // 2)
        return self.draw_further_inputs(spec, draw, inputs, torch.arange(start, start + tokens))

    def draw_span(self, draw: StepDraw, length: int) -> tuple[int, int]:
        """Draw the first position of a step's tokens among ``length`` positions, and the number of tokens."""
        tokens = draw.size(1, min(length, draw.max_size))
        return draw.size(0, length - tokens), tokens

    def draw_further_inputs(
        self, spec: StepSpec, draw: StepDraw, inputs: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        """Return ``inputs`` with all others that the step takes for tokens at the positions ``slots`` (tokens,)."""
        rows, tokens = inputs["input_ids"].shape
        if self.takes_slots:
            inputs["slots"] = slots
        if spec.takes_position_ids:
            inputs["position_ids"] = spec.step_positions(slots.expand(rows, -1))
        inputs |= draw.embeddings(spec, rows, tokens)
        for name in spec.token_gate_inputs:
            inputs[name] = draw.booleans((rows, tokens))
        length, window = inputs["attention_mask"].shape[1], self.ring_window(spec.layout)
        ring = None if window is None else min(length, window + tokens - 1)
        for name, shape in zip(spec.layout.names, spec.layout.shapes(rows, length, ring), strict=True):
            inputs[name] = draw.normal(shape, spec.layout.dtype)
        return inputs
