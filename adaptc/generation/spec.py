"""Hold what is known of a step program besides its graph, and the names that the installed transformers uses.

A step with an adapter such as X-LoRA reads the model's last hidden state first, so it computes each token in two
passes. Each pass keeps its own keys and values (:func:`spec_for_passes`). The same step without adapters has one pass.
A cache of another number of passes is refused: part of it was never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import torch

from adaptc.bank.row_adapters import adapter_names_in
from adaptc.bank.selection import ProgramSelection
from adaptc.binding.sources.source import as_config
from adaptc.errors import AdaptcError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.passes.analysis.cache_inputs import count_passes
from adaptc.passes.graph.lifted import user_inputs
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore
from adaptc.tables import format_bytes

#: how a step knows the tokens before its own. SLIDING_WINDOW: a cache with room for more positions, masked, whose
#: sliding-window layers keep only their window. STATIC: the same with all positions in every layer. EXACT_LENGTH: a
#: cache that ends with the step's tokens, for models whose masks follow from its size. RECURRENT: a recurrent state.
#: UNCACHED: no cache, and each step is given the whole text.
SLIDING_WINDOW, STATIC, EXACT_LENGTH, RECURRENT, UNCACHED = CACHE_MODES = (
    "window",
    "room",
    "exact",
    "state",
    "nothing",
)


@dataclass(frozen=True, eq=False)
class GenerationSpec:
    """The spec of a step program: what its graph does not hold.

    ``config`` and ``generation_config`` are copies of the model's. ``max_batch`` and ``max_length`` are the most rows
    and positions that a cache may have. ``takes_position_ids`` and ``takes_inputs_embeds`` say whether the step takes
    position_ids, and inputs_embeds. ``vocab_size`` is the number of tokens, ``hidden_size`` the size of their
    embeddings. ``tokenizer`` returns the tokenizer that came with the program; None for none. ``cache_mode`` is one of
    :data:`CACHE_MODES`. ``mode_reason`` says why a better cache mode failed for the model; '' where none did.
    """

    config: Any
    generation_config: Any
    layout: CacheLayout
    max_batch: int
    max_length: int
    takes_position_ids: bool
    takes_inputs_embeds: bool
    vocab_size: int
    hidden_size: int
    embeds_dtype: torch.dtype
    tokenizer: Callable[[], Any] | None = field(default=None, kw_only=True)
    cache_mode: str = field(default=STATIC, kw_only=True)
    mode_reason: str = field(default="", kw_only=True)
    #: the token coefficients that a step takes, with a value for each of its tokens (see ``token_gates``)
    token_gate_inputs: tuple[str, ...] = field(default=(), kw_only=True)
    #: number of passes -> the spec of the same step with so many
    specs_by_passes: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def with_passes(self, passes: int) -> Self:
        """Return the spec of the same step with ``passes`` passes in it (see :class:`CacheLayout`).

        The same number gives the same object each time, because a cache belongs to the spec that it was made for.
        """
        if passes == self.layout.passes:
            return self
        found = self.specs_by_passes.get(passes)
        if found is None:
            made = replace(self, layout=self.layout.with_passes(passes))
            made.specs_by_passes[self.layout.passes] = self
            found = self.specs_by_passes.setdefault(passes, made)
        return found

    @property
    def sliding_window(self) -> int | None:
        """Return the size of the sliding window that the cache's rings keep; None where all positions are kept."""
        return self.layout.sliding_window if self.cache_mode == SLIDING_WINDOW else None

    def notes(self) -> list[str]:
        """Return the lines of a report about the cache."""
        if self.cache_mode == UNCACHED:
            return [f"no cache, so each token computes the whole text: {self.mode_reason}"]
        passes = f" in {self.layout.passes} passes" if self.layout.passes > 1 else ""
        if self.cache_mode == RECURRENT:
            return [
                f"state{passes}: {format_bytes(self.layout.nbytes(1, 0))} for each row; a prompt is read token by token"
            ]
        window = self.sliding_window
        each = format_bytes(self.layout.nbytes(1, 1, None if window is None else 0))
        note = f"cache: {len(self.layout.layers)} layers{passes}, {each} for each row and position"
        if window is not None:
            kept = format_bytes(self.layout.nbytes(1, 0, window))
            note += f", and at most {kept} for each row in layers that keep the last {window}"
        if self.cache_mode == STATIC and self.mode_reason:
            note += f", those that look back on a window among them: {self.mode_reason}"
        if self.cache_mode == EXACT_LENGTH:
            note += f", of which a step sees those up to its end alone: {self.mode_reason}"
        return [note]


@cache
def cache_argument_name() -> str:
    """Return the name that the installed transformers gives to a cache: "cache" or "past_key_values"."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def step_output(logits: torch.Tensor, past: Any) -> Any:
    """Return the logits and the cache of a step as a transformers model output."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields: dict[str, Any] = {cache_argument_name(): past}
    return CausalLMOutputWithPast(logits=logits, **fields)  # type: ignore[arg-type]


def spec_for_passes(spec: GenerationSpec, runner: Any) -> GenerationSpec:
    """Return the spec with the cache layout that ``runner`` needs: a program, a package, or what is bound to
    either."""
    if spec.cache_mode == UNCACHED:
        return spec
    if isinstance(runner, ProgramSelection) and not adapter_names_in(runner.mixes):
        return spec.with_passes(1)  # a bank runs rows without any adapter on the base
    program = runner.program if isinstance(runner, BoundProgram) else runner
    return spec.with_passes(count_passes(user_inputs(program))) if isinstance(program, ProgramCore) else spec


def base_pass_method_name(adapters: Sequence[Any]) -> str:
    """Return the name of a method among ``adapters`` that reads a duplicated base pass; '' where there is none.

    An adapter whose config cannot be read here is passed over.
    """
    for one in adapters:
        try:
            method = as_config(one).method("", "linear")
        except AdaptcError:  # the compilation raises this error
            continue
        if any(c.base_pass is not None for c in method.coefficients().values()):
            return method.name
    return ""
