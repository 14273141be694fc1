"""Check the names in a method's class: none may hide a function of the protocol, and none may be that of an older hook.

Python takes a field or a value of the class for the function of that name. It never calls a function whose name the
protocol does not know. So both would be ignored, or fail far from their cause.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from inspect import getattr_static, isroutine
from typing import Any

from adaptc.errors import MethodError, short_repr
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.method_hooks import Hooks
from adaptc.passes.protocol.parts.method_part import MethodPart

#: the objects of a method, by name
PARTS = {n: v for n, v in vars(Hooks).items() if isinstance(v, MethodPart)}

#: name that a hook had -> the name it has
_RENAMED = {
    "kin": "slot_family",
    "akin": "is_variant_of",
    "lineage": "family_key",
    "nested": "inside_multihead_attention",
    "moves_base": "changes_base_at_init",
    "clash": "conflict_with",
    "of_model": "config_from_model",
    "lengthens": "virtual_token_count",
    "attended": "attention_mask",
    "positions": "position_ids",
    "segments": "token_type_ids",
    "embedded": "inputs_embeds",
    "cached": "past_key_values",
    "decodes": "has_decoder_tokens",
    "decoder_attended": "decoder_attention_mask",
    "decoder_embedded": "decoder_inputs_embeds",
}
#: name that a hook had -> the object that has it, and its name there
_MOVED = {
    **{n: ("files", n) for n in ("read", "write", "keys", "derived", "fqn", "inner_path", "in_place", "summed")},
    **{n: ("files", n) for n in ("low_rank", "with_low_rank")},
    "file_names": ("files", "names"),
    **{n: ("sizes", n) for n in ("rank", "with_rank", "minimal", "with_sizes_of")},
    "at": ("sizes", "specialized_for"),
    "exact_sizes": ("sizes", "exact"),
    "rows": ("bank", "apply"),
    "rows_at_once": ("bank", "apply_fused"),
    "rows_grouped": ("bank", "apply_kernel"),
    "groups": ("bank", "has_kernel"),
    "row_wise": ("bank", "row_wise"),
    "fused": ("kernels", "apply"),
    "unfused": ("kernels", "why_missing"),
    **{n: ("sharing", n) for n in ("shares", "settle_shared_sizes", "grouped_slots")},
    "following": ("sharing", "tied_to"),
    "coefficients": ("extra_inputs", "coefficients"),
    "extras": ("extra_inputs", "extras"),
    "why_wrong": ("extra_inputs", "check_inputs"),
}


def check_names(method: Method | type[Method]) -> None:
    """Raise MethodError for an option or class value that has a function's name and would be called instead."""
    functions = {n for c in (Hooks, Method) for n, v in vars(c).items() if _is_function(v)}
    if hidden := sorted({f.name for f in fields(method)} & {*functions, *PARTS}):
        name = getattr(method, "__name__", type(method).__name__)
        if hidden[0] in PARTS:
            raise MethodError(
                f"{name} has an option called {hidden[0]!r}, as an object of every method is: write {hidden[0]} = ... "
                "without an annotation for that object, or give the option another name"
            )
        raise MethodError(
            f"{name} has an option called {hidden[0]!r}, as a function of every method is: give it another name"
        )
    check_class(method if isinstance(method, type) else type(method))


@cache
def check_class(method_class: type[Method]) -> None:
    """Raise MethodError for a value of a class that hides a function or an object of methods, and for older hooks."""
    check_old_hooks(method_class)
    for base in (Hooks, Method):
        for name, function in vars(base).items():
            found = getattr_static(method_class, name)
            if _is_function(function) and not _is_function(found):
                raise MethodError(
                    f"{method_class.__name__}.{name} is {short_repr(found)}, and a function of every method has that "
                    f"name: write def {name}(...), or give the value another name"
                )
    for name, default in PARTS.items():
        found, kind = getattr_static(method_class, name), type(default)
        if not isinstance(found, (kind, property)):
            raise MethodError(
                f"{method_class.__name__}.{name} is {short_repr(found)}, and that name is for an object of a class "
                f"derived from adaptc.methods.{kind.__name__}: write {name} = Your{kind.__name__}(), or give the value "
                "another name"
            )


def _is_function(value: Any) -> bool:
    # An object of a method has a __get__, as functions have.
    return not isinstance(value, MethodPart) and (isroutine(value) or isinstance(value, (classmethod, staticmethod)))


def check_old_hooks(method_class: type[Method]) -> None:
    """Raise MethodError for hooks that a class defines under names that adaptc calls no longer."""
    own: dict[str, Any] = {}
    for c in reversed(method_class.__mro__):
        if c is not object and c.__module__.partition(".")[0] != "adaptc":
            own |= vars(c)
    found = [n for n in {**_RENAMED, **_MOVED} if n in own and n not in vars(Hooks) and n not in vars(Method)]
    if not found:
        return
    told, parts = list[str](), dict[str, str]()
    for name in found:
        if name in _RENAMED:
            told.append(f"{name} is called {_RENAMED[name]} now")
        else:
            part, new = _MOVED[name]
            told.append(f"{name} is {part}.{new} now")
            parts[part] = type(PARTS[part]).__name__
    how = [
        f"{part} = Your{kind}(), an object of a class derived from adaptc.methods.{kind}"
        for part, kind in parts.items()
    ]
    raise MethodError(
        f"{method_class.__name__} was written for an older adaptc, which called other hooks: {'; '.join(told)}"
        + (f". Say {'; '.join(how)}" if how else "")
        + ". See examples/writing_methods.md"
    )
