"""The form of a program's answer, which options of transformers' calls ask for.

Before: the structure of the outputs that a program was captured with. After: which of these options ask for what the
program gives anyhow, and the answer as ``return_dict`` asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RETURN_DICT = "return_dict"
#: options that ask for another output -> what its names end with
_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "output_attentions": ("attentions",),
    "output_hidden_states": ("hidden_states",),
    "output_router_logits": ("router_logits",),
    "use_cache": ("past_key_values", "cache_params", "cache"),
}
#: options of answers -> the values that ask for nothing else than what every program gives
ANSWERS: Mapping[str, tuple[Any, ...]] = {
    RETURN_DICT: (None,),
    "logits_to_keep": (None, 0),
    **dict.fromkeys(_OUTPUTS, (None,)),
}


@dataclass(frozen=True)
class Answer:
    """``kind``: the class of the output; ``names``: of the values in it, where they have any."""

    kind: type
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: Any) -> Answer:
        """``spec``: the tree of a program's outputs."""
        if spec is None or spec.type is None:
            return cls(object)
        names = spec.context if isinstance(spec.context, (list, tuple)) else ()
        return cls(spec.type, tuple(n for n in names if isinstance(n, str)))

    def has(self, option: str, value: Any) -> bool:
        """Whether an option of :data:`ANSWERS` asks for what the program gives."""
        if any(value is same for same in ANSWERS[option]):
            return True
        if option == RETURN_DICT:
            named = hasattr(self.kind, "to_tuple")
            return (value is True and named) or (value is False and (named or issubclass(self.kind, tuple)))
        if option in _OUTPUTS:
            return value is any(name.endswith(_OUTPUTS[option]) for name in self.names)
        return False

    def refusal(self, option: str, value: Any) -> str:
        """What to do about an option that asks for something else."""
        if option == RETURN_DICT:
            kind = "values without a class" if self.kind is object else f"a {self.kind.__name__}"
            return f"'return_dict' is {value!r}, and the program gives {kind}: leave it out."
        way = f"set model.config.{option}" if option in _OUTPUTS else "give it among the example_inputs"
        return f"{option!r} would change the answer, which is fixed as it was captured: {way} and capture the model so."


def as_asked(out: Any, return_dict: Any) -> Any:
    """What a program gives, as a tuple of what it has where ``return_dict`` is False."""
    return out.to_tuple() if return_dict is False and hasattr(out, "to_tuple") else out
