"""Check what an option may hold, as its annotation says, for the fields of configs and the options of functions.

Configs are checked alike whether they come from files or from objects. A rule returns the value as plain Python types,
or raises :class:`InvalidValue` that says where in it something else was found.

Integers have at most 64 bits, and numbers are finite in float32, which is what they become. Booleans are no numbers.
Strings can be written as UTF-8. An annotation that is not understood here is left unchecked, and so are objects where
it says ``Any``.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Literal, TypeVar, Union
from weakref import WeakKeyDictionary

import numpy as np
import torch

from adaptc.errors import ConfigError, short_repr
from adaptc.nesting import LIST_TYPES, MAX_DEPTH

F = TypeVar("F", bound=Callable[..., Any])

_FLOAT32_MAX = torch.finfo(torch.float32).max


class InvalidValue(Exception):
    """A value that does not fit: ``value``, found at ``path`` in a field, is not what was ``expected``. ``near``: its
    type is right."""

    def __init__(self, expected: str, value: Any, path: str = "", has_right_type: bool = False) -> None:
        super().__init__(expected)
        self.expected, self.value, self.path, self.has_right_type = expected, value, path, has_right_type or bool(path)

    def prepend_location(self, step: Any) -> InvalidValue:
        """Return this invalid value as seen from the container that has the value at ``step``."""
        return InvalidValue(self.expected, self.value, f"[{step!r}]{self.path}")


@dataclass(frozen=True)
class Rule:
    """A rule for a value. ``check`` returns a value that fits, or raises :class:`InvalidValue`; ``expected`` says what
    fits."""

    expected: str
    check: Callable[[Any], Any]


_field_rules: WeakKeyDictionary[type, dict[str, Rule]] = WeakKeyDictionary()


def field_rules(config: type) -> Mapping[str, Rule]:
    """Return the rules of a dataclass by field, without the fields whose annotations are not understood."""
    if config not in _field_rules:
        found = {
            f.name: make_rule(hint) for f in fields(config) if (hint := _resolve_annotation(config, f.name)) is not None
        }
        _field_rules[config] = {name: rule for name, rule in found.items() if rule is not None}
    return _field_rules[config]


def validates_options(*options: str) -> Callable[[F], F]:
    """Return a decorator for functions: a call raises ConfigError where one of these keyword ``options`` is not what
    its annotation says."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in rules.keys() & kwargs.keys():
                kwargs[name] = validate_option(name, rules[name], kwargs[name])
            return function(*args, **kwargs)

        rules = _option_rules(function, *options)
        return typing.cast("F", call)

    return decorate


def checked_options(function: Callable[..., Any], **options: Any) -> list[Any]:
    """Return the values of these ``options``, in the order and form in which ``function``, whose annotations say what
    fits, takes them. Raises ConfigError as :func:`validate_option` does."""
    rules = _option_rules(function, *options)
    return [validate_option(name, rules[name], value) for name, value in options.items()]


@functools.cache
def _option_rules(function: Callable[..., Any], *options: str) -> Mapping[str, Rule]:
    hints = typing.get_type_hints(function)
    rules = {name: rule for name in options if (rule := make_rule(hints[name])) is not None}
    assert len(rules) == len(options)
    return rules


def validate_option(option: str, rule: Rule, value: Any) -> Any:
    """Return ``value`` in the form that the rule gives it. Raises ConfigError that names the option and the place in it
    that is wrong."""
    try:
        return rule.check(value)
    except InvalidValue as m:
        expected = m.expected if m.has_right_type else rule.expected
        raise ConfigError(f"{option}{m.path} must be {expected}, got {short_repr(m.value)}") from None


def _resolve_annotation(config: type, name: str) -> Any:
    """Return the annotation of a field as an object; None where its names mean nothing in the module it was written
    in."""
    owner = next(c for c in config.__mro__ if name in vars(c).get("__annotations__", ()))
    holder = types.SimpleNamespace(__annotations__={name: vars(owner)["__annotations__"][name]})
    # A public class says that it lives in the facade. The functions of a dataclass know the module it was written in.
    written_in = getattr(vars(owner).get("__init__"), "__globals__", None)
    module = sys.modules.get(owner.__module__)
    namespace = written_in or (vars(module) if module else {})
    try:
        return typing.get_type_hints(holder, namespace, dict(vars(owner)))[name]
    except Exception:  # names that only type checkers import, or that are local to a function
        return None


def make_rule(annotation: Any) -> Rule | None:
    """Return the rule for an annotation; None for one that is not understood."""
    if annotation in _LEAF_RULES:
        return _LEAF_RULES[annotation]
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Literal:
        return Rule(" or ".join(map(repr, args)), lambda v: _check_literal(args, v))
    rules = [make_rule(a) for a in args if a is not ...]
    if None in rules:
        return None
    known_rules = typing.cast("list[Rule]", rules)
    if origin in (Union, types.UnionType):
        return _union_rule(known_rules)
    if origin is tuple and args and args[-1] is not ...:
        what = f"{len(args)} values ({', '.join(r.expected for r in known_rules)})"
        return Rule(what, lambda v: _check_tuple(what, known_rules, v))
    if origin in (tuple, *LIST_TYPES, Sequence, Collection):
        (item,) = known_rules or [_LEAF_RULES[Any]]
        return Rule(f"a list of {_plural(item.expected)}" if known_rules else "a list", lambda v: _check_list(item, v))
    if origin in (dict, Mapping):
        key, value = known_rules or [_LEAF_RULES[Any]] * 2
        return Rule(
            "a dict" if not known_rules else f"a dict of {_plural(value.expected)}",
            lambda v: _check_dict(key, value, v),
        )
    return None


def _plural(expected: str) -> str:
    """Return the plural of what is expected: "integers" for "an integer"."""
    return " or ".join(w.partition(" ")[2] + "s" if w.startswith(("a ", "an ")) else w for w in expected.split(" or "))


def _union_rule(rules: Sequence[Rule]) -> Rule:
    expected = " or ".join(r.expected for r in rules)

    def check(value: Any) -> Any:
        near = None
        for rule in rules:
            try:
                return rule.check(value)
            except InvalidValue as misfit:
                near = misfit if misfit.has_right_type and near is None else near
        raise near or InvalidValue(expected, value)

    return Rule(expected, check)


def _check_none(value: Any) -> None:
    if value is not None:
        raise InvalidValue("None", value)


def _check_bool(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidValue("True or False", value)


def _check_int(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InvalidValue("an integer", value)
    if not -(2**63) <= value < 2**64:
        raise InvalidValue("an integer of 64 bits", value, has_right_type=True)
    return int(value)


def is_finite_in_float32(value: Any) -> bool:
    """Return whether a real number, of any type and size, is finite in float32."""
    try:
        return abs(float(value)) <= _FLOAT32_MAX  # false for NaN, too
    except OverflowError:
        return False


def _check_float(value: Any) -> float | int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InvalidValue("a number", value)
    if not is_finite_in_float32(value):
        raise InvalidValue("a number that is finite in float32", value, has_right_type=True)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value if type(value) is float else float(value)


def _check_generator(value: Any) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise InvalidValue("a torch.Generator", value)
    return value


def _check_str(value: Any) -> str:
    if isinstance(value, Enum):  # PEFT's own kinds of strings
        value = value.value
    if not isinstance(value, str):
        raise InvalidValue("a string", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValue("a string that can be written as UTF-8", value, has_right_type=True) from None
    return value


def _check_any(value: Any, depth: int = 0) -> Any:
    """Return ``value``, whatever it is. Numbers and strings in it must fit, and lists and dicts in it must not be
    nested deeper than :data:`MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        raise InvalidValue(f"nested no deeper than {MAX_DEPTH}", value, has_right_type=True)
    if isinstance(value, float):
        return _check_float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _check_int(value)
    if isinstance(value, str) and not isinstance(value, Enum):
        return _check_str(value)
    if isinstance(value, Mapping):
        for k, v in value.items():
            _check_any(k, depth + 1)
            _check_any(v, depth + 1)
    elif isinstance(value, LIST_TYPES):
        for v in value:
            _check_any(v, depth + 1)
    return value


def _check_literal(allowed: Sequence[Any], value: Any) -> Any:
    if any(type(value) is type(a) and value == a for a in allowed):
        return value
    raise InvalidValue(" or ".join(map(repr, allowed)), value)


def _check_list(item: Rule, value: Any) -> Any:
    if isinstance(value, range):
        value = list(value[: 2**20])
    if not isinstance(value, LIST_TYPES):
        raise InvalidValue("a list", value)
    try:  # in one go, since there may be millions
        new = list(map(item.check, value))
    except InvalidValue:
        for i, v in enumerate(value):
            _check_item(i, item, v)
        raise
    return value if all(map(operator.is_, new, value)) else new


def _check_tuple(expected: str, rules: Sequence[Rule], value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != len(rules):
        raise InvalidValue(expected, value)
    try:
        new = [rule.check(v) for rule, v in zip(rules, value, strict=True)]
    except InvalidValue:
        for i, (rule, v) in enumerate(zip(rules, value, strict=True)):
            _check_item(i, rule, v)
        raise
    return value if all(map(operator.is_, new, value)) else type(value)(new)


def _check_dict(key: Rule, value: Rule, mapping: Any) -> Any:
    if not isinstance(mapping, Mapping):
        raise InvalidValue("a dict", mapping)
    new = {}
    for k, v in mapping.items():
        try:
            name = key.check(k)
        except InvalidValue as misfit:
            raise InvalidValue(f"a dict whose keys are each {misfit.expected}", mapping, has_right_type=True) from None
        new[name] = _check_item(name, value, v)
    return mapping if type(mapping) is dict and all(new[k] is v for k, v in mapping.items()) else new


def _check_item(key: Any, rule: Rule, value: Any) -> Any:
    try:
        return rule.check(value)
    except InvalidValue as misfit:
        raise misfit.prepend_location(key) from None


_LEAF_RULES: dict[Any, Rule] = {
    Any: Rule("a value", _check_any),
    None: Rule("None", _check_none),
    types.NoneType: Rule("None", _check_none),
    bool: Rule("True or False", _check_bool),
    int: Rule("an integer", _check_int),
    float: Rule("a number", _check_float),
    str: Rule("a string", _check_str),
    torch.Generator: Rule("a torch.Generator", _check_generator),
}
