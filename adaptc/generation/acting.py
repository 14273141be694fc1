"""Where adapters act that begin at a token: coefficients that a step program is given, and does not make.

A step sees the tokens of one call, and what invoked an adapter may have come before them. So its program has each
coefficient (``passes.ir.coefficients``) among its inputs, a value for each new token, and whoever calls it makes them:
of the whole prompt where a generation goes on from one; of the new tokens, and of what the cache remembers, where a
caller takes steps of its own. What a generation writes itself invokes nothing, as in PEFT, but stays adapted.

Before: a program, or what is bound to one. After: functions of token ids, with the adapter's own slots in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.source import as_config
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache import StepCache
from adaptc.passes.ir.coefficients import Coefficient
from adaptc.passes.ir.method import Method
from adaptc.program.assigned import Assignment
from adaptc.program.bound import program_of

#: name of a coefficient -> how it is made, and of which tensors
Made = Mapping[str, tuple[Coefficient, Sequence[Tensor]]]
_NOTHING: Made = MappingProxyType({})
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
    """``made``: for each prompt, or once for all of them, what the coefficients of its adapter are made of; ``prompt``:
    name -> a value for each token (rows, tokens) of the text that a generation began with, behind ``offset`` positions;
    {} for steps that belong to none."""

    names: Sequence[str]
    made: Sequence[Made]
    prompt: Mapping[str, Tensor] = field(default_factory=dict)
    offset: int = 0

    @classmethod
    def of(cls, names: Sequence[str], runs: Any, binding: Any) -> Acting:
        """Of the adapter in ``binding``, or of those that an assignment has for its rows; nothing acts where it is the
        base. Raises ConfigError for a mix of adapters that begin to act at other tokens."""
        program = program_of(runs)
        if not isinstance(runs, Assignment):
            return cls(names, [_made(program, binding)])
        known = {name: _made(program, b) for name, b in runs.adapters.items()}
        return cls(names, [_of_mix([(n, known[n]) for n in mix]) for mix in runs.mixes])

    def for_prompt(self, ids: Tensor | None, past: StepCache | None, offset: int) -> Acting:
        """For a generation of this text. Raises ConfigError for one of embeddings, which invoke nothing."""
        if not self.names:
            return self
        if ids is None:
            if made := [name for one in self.made for name in one]:
                raise ConfigError(
                    f"inputs_embeds have no tokens, by which {', '.join(dict.fromkeys(made))} is found: give "
                    "input_ids, or use gen.base"
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
            since = first if known is None else torch.where(known < start, known, first)
            past.since = {**past.since, name: since}
        return found

    def _of(self, ids: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next((slots[0].device for one in self.made for _, slots in one.values() if slots), ids.device)
        ids = ids.to(device)
        out = {name: torch.zeros(ids.shape, dtype=torch.bool, device=device) for name in self.names}
        for made, rows in self._groups(ids.shape[0]):
            for name in self.names:
                if name in made:
                    c, slots = made[name]
                    value = c.make(ids[rows], *slots)
                    out[name][rows] = value | before[name][rows, None] if name in before else value
        return out

    def _groups(self, rows: int) -> Iterator[tuple[Made, Any]]:
        """What is made alike, with the rows that it is for: those of a prompt follow each other."""
        if len(self.made) == 1:
            yield self.made[0], slice(None)
            return
        each, rest = divmod(rows, len(self.made))
        if rest:
            raise AdaptcError(f"adapters has {len(self.made)} entries, and the batch has {rows} rows")
        places: dict[int, list[int]] = {}
        for i in range(rows):
            places.setdefault(id(self.made[i // each]), []).append(i)
        for found in places.values():
            yield self.made[found[0] // each], found

    def _before(self, past: StepCache | None, start: int) -> dict[str, Tensor]:
        """Whether each row was adapted at the last of so many positions."""
        return {} if past is None else {n: t < start for n, t in past.since.items()}


def _made(program: Any, binding: Any) -> Made:
    """What the coefficients of one adapter are made of; nothing of the base."""
    made: dict[str, tuple[Coefficient, Sequence[Tensor]]] = {}
    values = {} if binding is None else binding.values
    for a in program.adaptation.attachments:
        for name in of_tokens(a.method):
            c = a.method.coefficients()[name]
            slots = [a.slots[s] for s in c.slots]
            if name not in made and all(f in values for f in slots):
                made[name] = (c, [values[f].detach() for f in slots])
    return made


def _of_mix(adapters: Sequence[tuple[str, Made]]) -> Made:
    """Of the adapters of one row, which all begin to act at the same tokens."""
    if not adapters:
        return _NOTHING
    first, one = adapters[0]
    for name, other in adapters[1:]:
        if one.keys() != other.keys() or any(not _same(one[n][1], other[n][1]) for n in one):
            raise ConfigError(
                f"a row mixes {first!r} and {name!r}, which begin to act at other tokens: a step has one beginning for "
                "each row. Mix adapters that the same tokens invoke, or give the row one of them"
            )
    return one


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
