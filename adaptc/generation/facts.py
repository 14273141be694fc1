"""What is known of a step program beside its graph, and what this release of transformers calls things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import torch

from adaptc.generation.layout import CacheLayout
from adaptc.tables import size

#: what a step has of the tokens before its own: a cache with room for more, which is masked, and whose sliding layers
#: keep their window alone; the same with all positions in every layer; a cache whose room ends with the step's own
#: tokens, for models whose masks follow from its size; a state instead of a cache; or nothing, and the whole text is
#: given
WINDOW, ROOM, EXACT, STATE, NOTHING = KEEPS = ("window", "room", "exact", "state", "nothing")


@dataclass(frozen=True, eq=False)
class Facts:
    """``config``, ``generation_config``: copies of the model's. ``max_batch``, ``max_length``: rows and positions that
    a cache has at most. ``positions``, ``embeds``: whether the step takes position ids, and embeddings. ``vocabulary``,
    ``width``: how many tokens there are, and the size of their embeddings. ``tokenizer``: gives the
    one that came with the program, if one did. ``keeps``: see :data:`KEEPS`; ``why``: what the model does not allow,
    where it is not the first of them that it could be."""

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
    #: coefficients that a step is given, a value for each of its tokens (see ``acting``)
    acts: tuple[str, ...] = field(default=(), kw_only=True)
    #: the facts of the same step with another number of passes, by that
    others: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def of_passes(self, passes: int) -> Self:
        """Those of the same step with so many passes in it (see :class:`CacheLayout`): each time the same object, since
        caches are of one."""
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
        """Positions that sliding layers of the cache keep, None for all."""
        return self.layout.window if self.keeps == WINDOW else None

    def notes(self) -> list[str]:
        """What a report says of the cache."""
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
    """What this release of transformers calls a cache."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def step_output(logits: torch.Tensor, past: Any) -> Any:
    """What a step gives, as models of transformers do."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields: dict[str, Any] = {past_name(): past}
    return CausalLMOutputWithPast(logits=logits, **fields)  # type: ignore[arg-type]
