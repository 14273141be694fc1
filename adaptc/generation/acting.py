"""Where adapters act that begin at a token: coefficients that a step program is given, and does not make.

A step sees the tokens of one call, and what invoked an adapter may have come before them. So its program has each
coefficient (``passes.ir.coefficients``) among its inputs, a value for each new token, and whoever calls it makes them:
of the whole prompt where a generation goes on from one; of the new tokens, and of what the cache remembers, where a
caller takes steps of its own. What a generation writes itself invokes nothing, as in PEFT, but stays adapted.

Before: a program, or what is bound to one. After: functions of token ids, with the adapter's own slots in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.source import as_config
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache import StepCache
from adaptc.passes.ir.coefficients import Coefficient
from adaptc.passes.ir.method import Method

#: the position from which rows are adapted in which nothing has invoked an adapter
NEVER = torch.iinfo(torch.int64).max


def coefficients_of(adapters: Sequence[Any]) -> tuple[str, ...]:
    """The names of the coefficients of tokens that these adapters read, as far as their configs say what they are."""
    found: dict[str, None] = {}
    for one in adapters:
        try:
            method = as_config(one).method("", "linear")
        except AdaptcError:  # whoever compiles it says what it is
            continue
        found |= dict.fromkeys(of_tokens(method))
    return tuple(found)


def of_tokens(method: Method) -> list[str]:
    """The names of a method's coefficients that are made of token ids alone."""
    return [n for n, c in method.coefficients().items() if c.first is None]


def refuse_acting(names: Sequence[str], what: str) -> None:
    """Raises ConfigError where there are coefficients and ``what`` cannot be given any."""
    if names:
        raise ConfigError(
            f"{what} with an adapter that acts from a token onwards ({', '.join(names)}), which is not supported. "
            "adaptc.compile(model, config) gives a program that computes logits with it"
        )


@dataclass(frozen=True)
class Acting:
    """``made``: name -> how, and of which tensors. ``prompt``: name -> a value for each token (rows, tokens) of the
    text that a generation began with, behind ``offset`` positions; {} for steps that belong to none."""

    names: Sequence[str]
    made: Mapping[str, tuple[Coefficient, Sequence[Tensor]]]
    prompt: Mapping[str, Tensor] = field(default_factory=dict)
    offset: int = 0

    @classmethod
    def of(cls, names: Sequence[str], program: Any, binding: Any) -> Acting:
        """Of the adapter in ``binding``; nothing acts where it is the base."""
        made: dict[str, tuple[Coefficient, Sequence[Tensor]]] = {}
        values = {} if binding is None else binding.values
        for a in program.adaptation.attachments:
            for name in of_tokens(a.method):
                c = a.method.coefficients()[name]
                slots = [a.slots[s] for s in c.slots]
                if name not in made and all(f in values for f in slots):
                    made[name] = (c, [values[f].detach() for f in slots])
        return cls(names, made)

    def for_prompt(self, ids: Tensor | None, past: StepCache | None, offset: int) -> Acting:
        """For a generation of this text. Raises ConfigError for one of embeddings, which invoke nothing."""
        if not self.names:
            return self
        if ids is None:
            if self.made:
                raise ConfigError(
                    f"inputs_embeds have no tokens, by which {', '.join(self.made)} is found: give input_ids, or use "
                    "gen.base"
                )
            return self
        before = self._before(past, offset) if offset else {}
        return Acting(self.names, self.made, self._of(ids, before), offset)

    def inputs(self, ids: Tensor | None, past: StepCache, rows: int, tokens: int) -> dict[str, Tensor]:
        """What a step of new tokens (rows, tokens) is given, and ``past`` remembers of it."""
        if not self.names:
            return {}
        start = past.length
        before = self._before(past, start)
        if self.prompt:
            columns = (torch.arange(start, start + tokens, device=past.device) - self.offset).clamp(min=0)
            found = {n: t[:, columns.clamp(max=t.shape[1] - 1)] for n, t in self.prompt.items()}
            found = {n: t.repeat_interleave(rows // t.shape[0], 0).contiguous() for n, t in found.items()}
        elif ids is None:
            found = {n: torch.zeros(rows, tokens, dtype=torch.bool, device=past.device) for n in self.names}
        else:
            found = self._of(ids.to(past.device), before)
        for name, on in found.items():
            first = torch.where(on.any(1), start + on.long().argmax(1), NEVER)
            known = past.since.get(name)
            past.since[name] = first if known is None else torch.where(known < start, known, first)
        return found

    def _of(self, ids: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name in self.names:
            if name in self.made:
                c, slots = self.made[name]
                value = c.make(ids.to(slots[0].device), *slots)
            else:
                value = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
            out[name] = value | before[name][:, None] if name in before and name in self.made else value
        return out

    def _before(self, past: StepCache | None, start: int) -> dict[str, Tensor]:
        """Whether each row was adapted at the last of so many positions."""
        return {} if past is None else {n: t < start for n, t in past.since.items()}
