"""Hold what is known of a step program besides its graph, and the names that the installed transformers uses.

A step with an adapter such as X-LoRA reads the model's last hidden state first, so it computes each token in two
passes. Each pass keeps its own keys and values (:func:`facts_for`). The same step without adapters has one pass. A
cache of another number of passes is refused: part of it was never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import torch

from adaptc.bank.row_adapters import used
from adaptc.bank.selection import Assigned
from adaptc.binding.sources.source import as_config
from adaptc.errors import AdaptcError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.passes.analysis.cache_inputs import passes_of
from adaptc.passes.graph.lifted import user_inputs
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore
from adaptc.tables import size

#: how a step knows the tokens before its own. WINDOW: a cache with room for more positions, masked, whose
#: sliding-window layers keep only their window. ROOM: the same with all positions in every layer. EXACT: a cache that
#: ends with the step's tokens, for models whose masks follow from its size. STATE: a recurrent state. NOTHING: no
#: cache, and each step is given the whole text.
WINDOW, ROOM, EXACT, STATE, NOTHING = KEEPS = ("window", "room", "exact", "state", "nothing")


@dataclass(frozen=True, eq=False)
class GenerationSpec:
    """The facts of a step program that its graph does not hold.

    ``config`` and ``generation_config`` are copies of the model's. ``max_batch`` and ``max_length`` are the most rows
    and positions that a cache may have. ``positions`` and ``embeds`` say whether the step takes position_ids, and
    inputs_embeds. ``vocabulary`` is the number of tokens, ``width`` the size of their embeddings. ``tokenizer`` returns
    the tokenizer that came with the program; None for none. ``keeps`` is one of :data:`KEEPS`. ``why`` says why a
    better kind of step failed for the model; '' where none did.
    """

    config: Any
    generation_config: Any
    layout: CacheLayout
    max_batch: int
    max_length: int
    positions: bool
    embeds: bool
    vocabulary: int
    width: int
    embeds_dtype: torch.dtype
    tokenizer: Callable[[], Any] | None = field(default=None, kw_only=True)
    keeps: str = field(default=ROOM, kw_only=True)
    why: str = field(default="", kw_only=True)
    #: the token coefficients that a step takes, with a value for each of its tokens (see ``token_gates``)
    acts: tuple[str, ...] = field(default=(), kw_only=True)
    #: number of passes -> the facts of the same step with so many
    others: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def of_passes(self, passes: int) -> Self:
        """Return the facts of the same step with ``passes`` passes in it (see :class:`CacheLayout`).

        The same number gives the same object each time, because a cache belongs to the facts that it was made for.
        """
        if passes == self.layout.passes:
            return self
        found = self.others.get(passes)
        if found is None:
            made = replace(self, layout=self.layout.of_passes(passes))
            made.others[self.layout.passes] = self
            found = self.others.setdefault(passes, made)
        return found

    @property
    def window(self) -> int | None:
        """Return the size of the sliding window that the cache's rings keep; None where all positions are kept."""
        return self.layout.window if self.keeps == WINDOW else None

    def notes(self) -> list[str]:
        """Return the lines of a report about the cache."""
        if self.keeps == NOTHING:
            return [f"no cache, so each token computes the whole text: {self.why}"]
        passes = f" in {self.layout.passes} passes" if self.layout.passes > 1 else ""
        if self.keeps == STATE:
            return [f"state{passes}: {size(self.layout.nbytes(1, 0))} for each row; a prompt is read token by token"]
        window = self.window
        each = size(self.layout.nbytes(1, 1, None if window is None else 0))
        note = f"cache: {len(self.layout.layers)} layers{passes}, {each} for each row and position"
        if window is not None:
            kept = size(self.layout.nbytes(1, 0, window))
            note += f", and at most {kept} for each row in layers that keep the last {window}"
        if self.keeps == ROOM and self.why:
            note += f", those that look back on a window among them: {self.why}"
        if self.keeps == EXACT:
            note += f", of which a step sees those up to its end alone: {self.why}"
        return [note]


@cache
def past_name() -> str:
    """Return the name that the installed transformers gives to a cache: "cache" or "past_key_values"."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def step_output(logits: torch.Tensor, past: Any) -> Any:
    """Return the logits and the cache of a step as a transformers model output."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields: dict[str, Any] = {past_name(): past}
    return CausalLMOutputWithPast(logits=logits, **fields)  # type: ignore[arg-type]


def facts_for(facts: GenerationSpec, runs: Any) -> GenerationSpec:
    """Return the facts with the cache layout that ``runs`` needs: a program, a package, or what is bound to either."""
    if facts.keeps == NOTHING:
        return facts
    if isinstance(runs, Assigned) and not used(runs.mixes):
        return facts.of_passes(1)  # a bank runs rows without any adapter on the base
    program = runs.program if isinstance(runs, Bound) else runs
    return facts.of_passes(passes_of(user_inputs(program))) if isinstance(program, ProgramCore) else facts


def first_pass_of(adapters: Sequence[Any]) -> str:
    """Return the name of a method among ``adapters`` that reads a duplicated base pass; '' where there is none.

    An adapter whose config cannot be read here is passed over.
    """
    for one in adapters:
        try:
            method = as_config(one).method("", "linear")
        except AdaptcError:  # the compilation raises this error
            continue
        if any(c.first is not None for c in method.coefficients().values()):
            return method.name
    return ""
