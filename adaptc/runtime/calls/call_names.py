"""Match a call's arguments to a program's inputs.

A call may give positional inputs and keywords in any way that the model itself takes. The result has exactly the
positional inputs and keywords that the program was captured with, without those that it fills in itself. An error names
each input that is missing or not taken, and what the program takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptc.errors import AdaptcError, did_you_mean, listing
from adaptc.runtime.calls.output_form import OUTPUT_OPTIONS, RETURN_DICT, OutputType, apply_return_dict

#: keywords of other libraries' calls that a program does not take -> what to do instead
_REFUSED_KEYWORDS = {
    "adapter_names": "rows of one call have adapters of their own in a bank: prog.bank({...})(..., adapters=[...])",
    "adapters": "rows of one call have adapters of their own in a bank: prog.bank({...})(..., adapters=[...])",
    "adapter_scale": "what is bound keeps its adapter as it is, and rows of a bank have weights: "
    "prog.bind(adapter, scale=...), or adapters=[{'fr': 0.5}, ...]",
    "alora_offsets": "where activated LoRA acts is found in input_ids by the program itself",
    "task_ids": "no adapter of the program is mixed by task, as Poly is: prog.bind(adapter) gives a callable for each",
}


@dataclass(frozen=True)
class CallNames:
    """The names of a program's inputs, and how a call's arguments are matched to them.

    The program was captured with the inputs ``positional`` and ``keywords``. ``forward_arg_names`` has the parameters
    of the model's ``forward`` in order, as far as they are known. Keywords in ``fills`` may be left out. ``constants``
    are the inputs that were captured as Python values. ``output_type`` is the form of the outputs.
    """

    positional: Sequence[str]
    keywords: Sequence[str]
    forward_arg_names: Sequence[str]
    fills: Collection[str]
    constants: Mapping[str, Any]
    output_type: OutputType
    #: inputs that need not be given, with their captured values: constants that are None or ask for a form of outputs
    optional_constants: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        known = {n: v for n, v in self.constants.items() if v is None or n in OUTPUT_OPTIONS}
        object.__setattr__(self, "optional_constants", known)

    def has_all_keywords(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether ``kwargs`` give each keyword of the program a value, so that nothing is to be arranged."""
        return all(
            n in kwargs and (kwargs[n] is not None or n not in self.fills) and n not in OUTPUT_OPTIONS
            for n in self.keywords
        )

    def convert_output(self, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the output ``out`` in the form that the call's ``return_dict`` asks for."""
        asked = kwargs.get(RETURN_DICT)
        if asked is None and len(args) > len(self.positional) and RETURN_DICT in self.forward_arg_names:
            asked = dict(zip(self.forward_arg_names, args, strict=False)).get(RETURN_DICT)
        return apply_return_dict(out, asked)

    def arrange_arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional inputs and the keywords of the program, from a call's arguments.

        Keywords that the program fills in are left out where the call does not give them. Raises AdaptcError for inputs
        that are missing, given twice or not taken.
        """
        given = self._by_name(args, kwargs)
        own = [*self.positional, *self.keywords]
        if strange := [n for n, v in given.items() if not self._is_accepted(n, v, own)]:
            raise AdaptcError(" ".join([*(self._refusal_text(n, given[n]) for n in strange), self.usage_text()]))
        found = {n: v for n, v in given.items() if n in own and (v is not None or n not in self.fills)}
        found |= {
            n: v for n, v in self.optional_constants.items() if n in own and (n not in found or n in OUTPUT_OPTIONS)
        }
        if missing := [n for n in own if n not in found and n not in self.fills]:
            raise AdaptcError(f"missing {_listed_inputs(missing)}. {self.usage_text()}")
        return tuple(found[n] for n in self.positional), {n: found[n] for n in self.keywords if n in found}

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        order = self.forward_arg_names if len(self.forward_arg_names) > len(self.positional) else self.positional
        if len(args) > len(order):
            raise AdaptcError(f"got {len(args)} positional inputs, which is too many. {self.usage_text()}")
        given = dict(zip(order, args, strict=False))
        if twice := [n for n in kwargs if n in given]:
            raise AdaptcError(f"got {_listed_inputs(twice)} by position and by name. {self.usage_text()}")
        return given | dict(kwargs)

    def _is_accepted(self, name: str, value: Any, input_names: Collection[str]) -> bool:
        """Return whether an argument is taken: an input in ``input_names``, or a value that asks for what the program
        gives."""
        if name in OUTPUT_OPTIONS and (name not in input_names or name in self.constants):
            same = name in self.constants and (value is None or value is self.constants[name])
            return same or self.output_type.satisfies(name, value)
        return name in input_names or (value is None and name in self.forward_arg_names)

    def _refusal_text(self, name: str, value: Any) -> str:
        if name in _REFUSED_KEYWORDS:
            return f"{name!r} is not taken: {_REFUSED_KEYWORDS[name]}."
        if name in OUTPUT_OPTIONS:
            return self.output_type.refusal(name, value)
        if name in self.forward_arg_names:
            return (
                f"{name!r} is an input of the model, but the program was captured without it: "
                f"capture with example_inputs that have it."
            )
        return f"{name!r} is not an input of the program{did_you_mean(name, [*self.positional, *self.keywords])}."

    def not_tensor_text(self, name: str, value: Any) -> str:
        """Return a message for a value that is given in place of a tensor; it shows the call with tensors."""
        names = [n for n in (*self.positional, *self.keywords) if n not in self.fills and n not in self.constants]
        return f"input {name!r} must be a tensor, got {type(value).__name__}. {call_with_tensors('prog', names, name)}"

    def usage_text(self) -> str:
        """Return a sentence that says what inputs the program takes."""
        parts = []
        if self.positional:
            parts.append(f"{len(self.positional)} positional {_listed_inputs(self.positional)}")
        if self.keywords:
            parts.append(f"the keywords {listing(map(repr, self.keywords), 40)}")
        optional = [n for n in self.keywords if n in self.fills]
        may = f" ({', '.join(map(repr, optional))} may be left out)" if optional else ""
        return f"The program takes {' and '.join(parts) or 'no inputs'}{may}, as it was captured."


def call_with_tensors(function: str, names: Sequence[str], name: str) -> str:
    """Return a hint that shows a call of ``function`` with tensors for ``names``, or for ``name`` where it is not one.

    With ``input_ids`` among them it also shows a call with a tokenizer's output.
    """
    named = [name] if name not in names else names
    call = f"Give tensors: {function}({', '.join(f'{n}=torch.as_tensor({n})' for n in named)})"
    if "input_ids" in (*names, name):
        return f"{call}, or of a tokenizer {function}(**tokenizer(texts, return_tensors='pt'))"
    return call


def _listed_inputs(names: Sequence[str]) -> str:
    return f"input{'s' if len(names) > 1 else ''} {listing(map(repr, names), 40)}"
