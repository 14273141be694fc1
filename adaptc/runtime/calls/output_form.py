"""Handle the options of transformers' calls that choose the form of the outputs, such as ``return_dict``.

A program's outputs are fixed when it is captured. An option is taken where it asks for what the program gives anyhow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RETURN_DICT = "return_dict"
#: options that ask for another output -> the endings of that output's name
_OUTPUT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "output_attentions": ("attentions",),
    "output_hidden_states": ("hidden_states",),
    "output_router_logits": ("router_logits",),
    "use_cache": ("past_key_values", "cache_params", "cache"),
}
#: options of outputs -> the values that every program's outputs satisfy
OUTPUT_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    RETURN_DICT: (None,),
    "logits_to_keep": (None, 0),
    **dict.fromkeys(_OUTPUT_FIELDS, (None,)),
}


@dataclass(frozen=True)
class OutputType:
    """The form of a program's outputs: their class ``kind``, and the ``names`` of its fields if it has any."""

    output_class: type
    field_names: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, spec: Any) -> OutputType:
        """Return the form of a program's outputs, from the tree ``spec`` of its outputs."""
        if spec is None or spec.type is None:
            return cls(object)
        names = spec.context if isinstance(spec.context, (list, tuple)) else ()
        return cls(spec.type, tuple(n for n in names if isinstance(n, str)))

    def satisfies(self, option: str, value: Any) -> bool:
        """Return whether a value for an option of :data:`OUTPUT_OPTIONS` asks for what the program gives."""
        if any(value is same for same in OUTPUT_OPTIONS[option]):
            return True
        if option == RETURN_DICT:
            named = hasattr(self.output_class, "to_tuple")
            return (value is True and named) or (value is False and (named or issubclass(self.output_class, tuple)))
        if option in _OUTPUT_FIELDS:
            return value is any(name.endswith(_OUTPUT_FIELDS[option]) for name in self.field_names)
        return False

    def refusal(self, option: str, value: Any) -> str:
        """Return a message that says what to do about an option that asks for something else."""
        if option == RETURN_DICT:
            kind = "values without a class" if self.output_class is object else f"a {self.output_class.__name__}"
            return f"'return_dict' is {value!r}, and the program gives {kind}: leave it out."
        way = f"set model.config.{option}" if option in _OUTPUT_FIELDS else "give it among the example_inputs"
        return f"{option!r} would change the answer, which is fixed as it was captured: {way} and capture the model so."


def apply_return_dict(out: Any, return_dict: Any) -> Any:
    """Return a program's output ``out``, as a plain tuple where ``return_dict`` is False and it can be one."""
    return out.to_tuple() if return_dict is False and hasattr(out, "to_tuple") else out
