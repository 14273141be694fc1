"""Which of a call's arguments is which of a program's inputs.

Before: positional inputs and keywords, as the model itself would take them. After: exactly the positional inputs and
the keywords that the program was captured with, but for those that it makes itself; or an error that names each input
which is missing or too many, and what is taken instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import AdaptcError, did_you_mean, listing

#: keywords of other libraries' calls that ask for what a program does not do -> what it does instead
_NOT_YET = {
    "adapter_names": "rows of one call have adapters of their own in a bank: prog.bank({...})(..., adapters=[...])",
    "adapters": "rows of one call have adapters of their own in a bank: prog.bank({...})(..., adapters=[...])",
    "adapter_scale": "what is bound keeps its adapter as it is, and rows of a bank have weights: "
    "prog.bind(adapter, scale=...), or adapters=[{'fr': 0.5}, ...]",
    "alora_offsets": "where activated LoRA acts is found in input_ids by the program itself",
    "task_ids": "no adapter of the program is mixed by task, as Poly is: prog.bind(adapter) gives a callable for each",
}
#: keywords by which transformers models are asked for an answer of another form -> values for what a program does
ANSWERS: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (None, False),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "logits_to_keep": (None, 0),
}


@dataclass(frozen=True)
class CallNames:
    """``positional`` and ``keywords``: what the program was captured with. ``takes``: what the model's ``forward``
    takes, in order, as far as that is known. ``fills``: keywords that may be left out. ``none``: inputs that were
    captured as None."""

    positional: Sequence[str]
    keywords: Sequence[str]
    takes: Sequence[str]
    fills: Collection[str]
    none: Collection[str]

    def as_captured(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether keywords are those of the program, with nothing to be made for them."""
        return all(n in kwargs and (kwargs[n] is not None or n not in self.fills) for n in self.keywords)

    def arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See the module docstring."""
        given = self._by_name(args, kwargs)
        own = [*self.positional, *self.keywords]
        if strange := [n for n, v in given.items() if n not in own and not self._left_out(n, v)]:
            raise AdaptcError(" ".join([*map(self._refusal, strange), self.usage()]))
        found = {n: v for n, v in given.items() if n in own and (v is not None or n not in self.fills)}
        found |= {n: None for n in self.none if n in own and n not in found}
        if missing := [n for n in own if n not in found and n not in self.fills]:
            raise AdaptcError(f"missing {_inputs(missing)}. {self.usage()}")
        return tuple(found[n] for n in self.positional), {n: found[n] for n in self.keywords if n in found}

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        order = self.takes if len(self.takes) > len(self.positional) else self.positional
        if len(args) > len(order):
            raise AdaptcError(f"got {len(args)} positional inputs, which is too many. {self.usage()}")
        given = dict(zip(order, args, strict=False))
        if twice := [n for n in kwargs if n in given]:
            raise AdaptcError(f"got {_inputs(twice)} by position and by name. {self.usage()}")
        return given | dict(kwargs)

    def _left_out(self, name: str, value: Any) -> bool:
        """Whether an input that the program has not asks for what it does anyhow."""
        if name not in self.takes and name not in ANSWERS:
            return False
        return value is None or any(value is same for same in ANSWERS.get(name, ()))

    def _refusal(self, name: str) -> str:
        if name in _NOT_YET:
            return f"{name!r} is not taken: {_NOT_YET[name]}."
        if name in self.takes:
            return (
                f"{name!r} is an input of the model, but the program was captured without it: "
                f"capture with example_inputs that have it."
            )
        if name in ANSWERS:
            return f"{name!r} would change the answer, which is fixed as it was captured: capture the model so."
        return f"{name!r} is not an input of the program{did_you_mean(name, [*self.positional, *self.keywords])}."

    def usage(self) -> str:
        """What the program takes."""
        parts = []
        if self.positional:
            parts.append(f"{len(self.positional)} positional {_inputs(self.positional)}")
        if self.keywords:
            parts.append(f"the keywords {listing(map(repr, self.keywords), 40)}")
        optional = [n for n in self.keywords if n in self.fills]
        may = f" ({', '.join(map(repr, optional))} may be left out)" if optional else ""
        return f"The program takes {' and '.join(parts) or 'no inputs'}{may}, as it was captured."


def _inputs(names: Sequence[str]) -> str:
    return f"input{'s' if len(names) > 1 else ''} {listing(map(repr, names), 40)}"
