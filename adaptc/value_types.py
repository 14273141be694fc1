"""Check what an option may hold, as its annotation says, for the fields of configs and the options of functions.

Configs are checked alike whether they come from files or from objects. A rule returns the value as plain Python types,
or raises :class:`Misfit` that says where in it something else was found.

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

from adaptc.errors import ConfigError, shown

F = TypeVar("F", bound=Callable[..., Any])

#: the depth to which lists and dicts may be nested where an annotation says nothing of them
DEEPEST = 32
_LARGEST = torch.finfo(torch.float32).max
_LISTS = (list, tuple, set, frozenset)


class Misfit(Exception):
    """A value that does not fit: ``value``, found at ``path`` in a field, is not what was ``wanted``. ``near``: its
    type is right."""

    def __init__(self, wanted: str, value: Any, path: str = "", near: bool = False) -> None:
        super().__init__(wanted)
        self.wanted, self.value, self.path, self.near = wanted, value, path, near or bool(path)

    def inside(self, step: Any) -> Misfit:
        """Return this misfit as seen from the container that has the value at ``step``."""
        return Misfit(self.wanted, self.value, f"[{step!r}]{self.path}")


@dataclass(frozen=True)
class Rule:
    """A rule for a value. ``check`` returns a value that fits, or raises :class:`Misfit`; ``wanted`` says what fits."""

    wanted: str
    check: Callable[[Any], Any]


_tables: WeakKeyDictionary[type, dict[str, Rule]] = WeakKeyDictionary()


def table(config: type) -> Mapping[str, Rule]:
    """Return the rules of a dataclass by field, without the fields whose annotations are not understood."""
    if config not in _tables:
        found = {f.name: rule_of(hint) for f in fields(config) if (hint := _hint(config, f.name)) is not None}
        _tables[config] = {name: rule for name, rule in found.items() if rule is not None}
    return _tables[config]


def checked(*options: str) -> Callable[[F], F]:
    """Return a decorator for functions: a call raises ConfigError where one of these keyword ``options`` is not what
    its annotation says."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in rules.keys() & kwargs.keys():
                kwargs[name] = fitting(name, rules[name], kwargs[name])
            return function(*args, **kwargs)

        hints = typing.get_type_hints(function)
        rules = {name: rule for name in options if (rule := rule_of(hints[name])) is not None}
        assert len(rules) == len(options)
        return typing.cast("F", call)

    return decorate


def fitting(option: str, rule: Rule, value: Any) -> Any:
    """Return ``value`` in the form that the rule gives it. Raises ConfigError that names the option and the place in it
    that is wrong."""
    try:
        return rule.check(value)
    except Misfit as m:
        wanted = m.wanted if m.near else rule.wanted
        raise ConfigError(f"{option}{m.path} must be {wanted}, got {shown(m.value)}") from None


def _hint(config: type, name: str) -> Any:
    """Return the annotation of a field as an object; None where its names mean nothing in the module it was written
    in."""
    owner = next(c for c in config.__mro__ if name in vars(c).get("__annotations__", ()))
    holder = types.SimpleNamespace(__annotations__={name: vars(owner)["__annotations__"][name]})
    module = sys.modules.get(owner.__module__)
    try:
        return typing.get_type_hints(holder, vars(module) if module else {}, dict(vars(owner)))[name]
    except Exception:  # names that only type checkers import, or that are local to a function
        return None


def rule_of(hint: Any) -> Rule | None:
    """Return the rule for an annotation; None for one that is not understood."""
    if hint in _LEAVES:
        return _LEAVES[hint]
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return Rule(" or ".join(map(repr, args)), lambda v: _one_of(args, v))
    rules = [rule_of(a) for a in args if a is not ...]
    if None in rules:
        return None
    known = typing.cast("list[Rule]", rules)
    if origin in (Union, types.UnionType):
        return _union(known)
    if origin is tuple and args and args[-1] is not ...:
        what = f"{len(args)} values ({', '.join(r.wanted for r in known)})"
        return Rule(what, lambda v: _fixed(what, known, v))
    if origin in (tuple, *_LISTS, Sequence, Collection):
        (item,) = known or [_LEAVES[Any]]
        return Rule(f"a list of {_plural(item.wanted)}" if known else "a list", lambda v: _items(item, v))
    if origin in (dict, Mapping):
        key, value = known or [_LEAVES[Any]] * 2
        return Rule("a dict" if not known else f"a dict of {_plural(value.wanted)}", lambda v: _entries(key, value, v))
    return None


def _plural(wanted: str) -> str:
    """Return the plural of what is wanted: "integers" for "an integer"."""
    return " or ".join(w.partition(" ")[2] + "s" if w.startswith(("a ", "an ")) else w for w in wanted.split(" or "))


def _union(rules: Sequence[Rule]) -> Rule:
    wanted = " or ".join(r.wanted for r in rules)

    def check(value: Any) -> Any:
        near = None
        for rule in rules:
            try:
                return rule.check(value)
            except Misfit as misfit:
                near = misfit if misfit.near and near is None else near
        raise near or Misfit(wanted, value)

    return Rule(wanted, check)


def _none(value: Any) -> None:
    if value is not None:
        raise Misfit("None", value)


def _bool(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise Misfit("True or False", value)


def _int(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise Misfit("an integer", value)
    if not -(2**63) <= value < 2**64:
        raise Misfit("an integer of 64 bits", value, near=True)
    return int(value)


def finite_in_float32(value: Any) -> bool:
    """Return whether a real number, of any type and size, is finite in float32."""
    try:
        return abs(float(value)) <= _LARGEST  # false for NaN, too
    except OverflowError:
        return False


def _float(value: Any) -> float | int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise Misfit("a number", value)
    if not finite_in_float32(value):
        raise Misfit("a number that is finite in float32", value, near=True)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value if type(value) is float else float(value)


def _generator(value: Any) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise Misfit("a torch.Generator", value)
    return value


def _str(value: Any) -> str:
    if isinstance(value, Enum):  # PEFT's own kinds of strings
        value = value.value
    if not isinstance(value, str):
        raise Misfit("a string", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Misfit("a string that can be written as UTF-8", value, near=True) from None
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """Return ``value``, whatever it is. Numbers and strings in it must fit, and lists and dicts in it must not be
    nested deeper than :data:`DEEPEST`."""
    if depth > DEEPEST:
        raise Misfit(f"nested no deeper than {DEEPEST}", value, near=True)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _int(value)
    if isinstance(value, str) and not isinstance(value, Enum):
        return _str(value)
    if isinstance(value, Mapping):
        for k, v in value.items():
            _plain(k, depth + 1)
            _plain(v, depth + 1)
    elif isinstance(value, _LISTS):
        for v in value:
            _plain(v, depth + 1)
    return value


def is_deep(value: Any, left: int = DEEPEST) -> bool:
    """Return whether lists and dicts are nested deeper than they may be in a config."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, _LISTS):
        return False
    return left <= 0 or any(is_deep(v, left - 1) for v in value)


def _one_of(allowed: Sequence[Any], value: Any) -> Any:
    if any(type(value) is type(a) and value == a for a in allowed):
        return value
    raise Misfit(" or ".join(map(repr, allowed)), value)


def _items(item: Rule, value: Any) -> Any:
    if isinstance(value, range):
        value = list(value[: 2**20])
    if not isinstance(value, _LISTS):
        raise Misfit("a list", value)
    try:  # in one go, since there may be millions
        new = list(map(item.check, value))
    except Misfit:
        for i, v in enumerate(value):
            _at(i, item, v)
        raise
    return value if all(map(operator.is_, new, value)) else new


def _fixed(wanted: str, rules: Sequence[Rule], value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != len(rules):
        raise Misfit(wanted, value)
    try:
        new = [rule.check(v) for rule, v in zip(rules, value, strict=True)]
    except Misfit:
        for i, (rule, v) in enumerate(zip(rules, value, strict=True)):
            _at(i, rule, v)
        raise
    return value if all(map(operator.is_, new, value)) else type(value)(new)


def _entries(key: Rule, value: Rule, found: Any) -> Any:
    if not isinstance(found, Mapping):
        raise Misfit("a dict", found)
    new = {}
    for k, v in found.items():
        try:
            name = key.check(k)
        except Misfit as misfit:
            raise Misfit(f"a dict whose keys are each {misfit.wanted}", found, near=True) from None
        new[name] = _at(name, value, v)
    return found if type(found) is dict and all(new[k] is v for k, v in found.items()) else new


def _at(step: Any, rule: Rule, value: Any) -> Any:
    try:
        return rule.check(value)
    except Misfit as misfit:
        raise misfit.inside(step) from None


_LEAVES: dict[Any, Rule] = {
    Any: Rule("a value", _plain),
    None: Rule("None", _none),
    types.NoneType: Rule("None", _none),
    bool: Rule("True or False", _bool),
    int: Rule("an integer", _int),
    float: Rule("a number", _float),
    str: Rule("a string", _str),
    torch.Generator: Rule("a torch.Generator", _generator),
}
