"""Compute the token coefficients of aLoRA adapters, which act from an invocation token onwards, as inputs of a step.

A step sees only the tokens of one call, and the tokens that invoke an adapter may have come earlier. So a step program
takes each coefficient (``passes.protocol.coefficients``) as an input, with a value for each new token. A generation
computes them from its whole prompt. A caller who takes single steps gets them from the new tokens and from what the
cache remembers. Tokens that a generation writes invoke nothing, as in PEFT, but stay adapted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adaptc.bank.row_adapters import RowSelection
from adaptc.binding.sources.configs import as_config
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache.step_cache import StepCache
from adaptc.passes.protocol.coefficients import Coefficient
from adaptc.passes.protocol.method import Method
from adaptc.state.runner import program_of

#: coefficient name -> the coefficient, and the slots that it is computed from
Gates = Mapping[str, tuple[Coefficient, Sequence[Tensor]]]
_NO_GATES: Gates = MappingProxyType({})
#: the position from which a row is adapted that has not invoked an adapter
NEVER = torch.iinfo(torch.int64).max


def gate_names_of_adapters(adapters: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of the token coefficients that ``adapters`` read, as far as their configs can be read here."""
    return tuple(dict.fromkeys(n for m in readable_methods(adapters) for n in gate_names_of_method(m)))


def readable_methods(adapters: Sequence[Any]) -> Iterator[Method]:
    """Yield the methods of those of ``adapters`` whose configs can be read here."""
    for one in adapters:
        # The compilation raises this error.
        with contextlib.suppress(AdaptcError):
            yield as_config(one).method("", "linear")


def gate_names_of_method(method: Method) -> list[str]:
    """Return the names of a method's coefficients that follow from token ids alone."""
    return [n for n, c in method.extra_inputs.coefficients().items() if c.base_pass is None]


def refuse_token_gates(names: Sequence[str], what: str) -> None:
    """Raise ConfigError where ``names`` has coefficients; ``what`` says in the message what cannot take them."""
    if names:
        raise ConfigError(
            f"{what} with an adapter that acts from a token onwards ({', '.join(names)}), which is not supported. "
            "adaptc.compile(model, config) gives a program that computes logits with it"
        )


@dataclass(frozen=True)
class TokenGates:
    """The token coefficients of one generation, or of single steps.

    ``gates`` has an entry for each prompt, or one for all: the coefficients of its adapter with their slots.
    ``prompt_values`` maps a name to the values (rows, tokens), bool, for the text that the generation began with. This
    text stands behind ``offset`` positions of the cache. ``prompt_values`` is {} for steps that belong to no
    generation.
    """

    names: Sequence[str]
    gates: Sequence[Gates]
    prompt_values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    offset: int = 0

    @classmethod
    def from_binding(cls, names: Sequence[str], runner: Any, binding: Any) -> TokenGates:
        """Return the coefficients of the adapter in ``binding``, or of each row's adapters where ``runner`` has
        a selection by row.

        The base has none. Raises ConfigError for a row that mixes adapters with different invocation tokens.
        """
        program = program_of(runner)
        selection = getattr(runner, "selection", None)
        if not isinstance(selection, RowSelection):
            return cls(names, [_gates_of_binding(program, binding)])
        known = {name: _gates_of_binding(program, b) for name, b in selection.adapters.items()}
        return cls(names, [_gates_of_mix([(n, known[n]) for n in mix]) for mix in selection.mixes])

    def for_prompt(self, ids: Tensor | None, past: StepCache | None, offset: int) -> TokenGates:
        """Return the coefficients for a generation of the text ``ids`` (rows, tokens).

        Raises ConfigError where ``ids`` is None, for inputs_embeds have no tokens that could invoke an adapter.
        """
        if not self.names:
            return self
        if ids is None:
            if made := [name for one in self.gates for name in one]:
                raise ConfigError(
                    f"inputs_embeds have no tokens, by which {', '.join(dict.fromkeys(made))} is found: give "
                    "input_ids, or use gen.base"
                )
            return self
        before = self._was_active(past, offset) if offset else {}
        return TokenGates(self.names, self.gates, self._compute(ids, before), offset)

    def step_inputs(self, ids: Tensor | None, past: StepCache, rows: int, tokens: int) -> dict[str, Tensor]:
        """Return the coefficients (rows, tokens), bool, of a step of new tokens by name, and note them in
        ``past.since``."""
        if not self.names:
            return {}
        start = past.length
        was_active = self._was_active(past, start)
        if self.prompt_values:
            columns = (torch.arange(start, start + tokens, device=past.device) - self.offset).clamp(min=0)
            values = {n: t[:, columns.clamp(max=t.shape[1] - 1)] for n, t in self.prompt_values.items()}
            values = {n: t.repeat_interleave(rows // t.shape[0], 0).contiguous() for n, t in values.items()}
        elif ids is None:
            values = {n: torch.zeros(rows, tokens, dtype=torch.bool, device=past.device) for n in self.names}
        else:
            values = self._compute(ids.to(past.device), was_active)
        for name, on in values.items():
            first = torch.where(on.any(1), start + on.long().argmax(1), NEVER)
            known = past.active_from.get(name)
            since = first if known is None else torch.where(known < start, known, first)
            past.active_from = {**past.active_from, name: since}
        return values

    def _compute(self, ids: Tensor, was_active: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next((slots[0].device for one in self.gates for _, slots in one.values() if slots), ids.device)
        ids = ids.to(device)
        out = {name: torch.zeros(ids.shape, dtype=torch.bool, device=device) for name in self.names}
        for made, rows in self._rows_by_gates(ids.shape[0]):
            for name in self.names:
                if name in made:
                    c, slots = made[name]
                    value = c.make(ids[rows], *slots)
                    out[name][rows] = value | was_active[name][rows, None] if name in was_active else value
        return out

    def _rows_by_gates(self, rows: int) -> Iterator[tuple[Gates, Any]]:
        """Yield each distinct entry of ``gates`` with its rows; the rows of a prompt follow one another."""
        if len(self.gates) == 1:
            yield self.gates[0], slice(None)
            return
        each, rest = divmod(rows, len(self.gates))
        if rest:
            raise AdaptcError(f"adapters has {len(self.gates)} entries, and the batch has {rows} rows")
        places: dict[int, list[int]] = {}
        for i in range(rows):
            places.setdefault(id(self.gates[i // each]), []).append(i)
        for found in places.values():
            yield self.gates[found[0] // each], found

    def _was_active(self, past: StepCache | None, start: int) -> dict[str, Tensor]:
        """Return, by name, whether each row was adapted at the last of the first ``start`` positions: (rows,), bool."""
        return {} if past is None else {n: t < start for n, t in past.active_from.items()}


def _gates_of_binding(program: Any, binding: Any) -> Gates:
    """Return the token coefficients of the adapter in ``binding`` with their slots; empty for the base."""
    gates: dict[str, tuple[Coefficient, Sequence[Tensor]]] = {}
    values: Mapping[str, Tensor] = {} if binding is None else binding.values
    for a in program.adaptation.attachments:
        for name in gate_names_of_method(a.method):
            c = a.method.extra_inputs.coefficients()[name]
            slots = [a.slots[s] for s in c.slots]
            if name not in gates and all(f in values for f in slots):
                gates[name] = (c, [values[f].detach() for f in slots])
    return gates


def _gates_of_mix(adapters: Sequence[tuple[str, Gates]]) -> Gates:
    """Return the coefficients of one row's adapters. Raises ConfigError where they have different invocation tokens."""
    if not adapters:
        return _NO_GATES
    first, one = adapters[0]
    for name, other in adapters[1:]:
        if one.keys() != other.keys() or any(not _have_equal_slots(one[n][1], other[n][1]) for n in one):
            raise ConfigError(
                f"a row mixes {first!r} and {name!r}, which begin to act at other tokens: a step has one beginning for "
                "each row. Mix adapters that the same tokens invoke, or give the row one of them"
            )
    return one


def _have_equal_slots(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
