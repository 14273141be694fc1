"""Build the dataclasses of torch's schema from JSON data, with each value of exactly the type that the schema says.

torch's own reader takes any value for any field, and ignores fields that it does not know. It looks type hints up anew
for every object. Here the hints are looked up once, and every text passes the table of
:mod:`adaptc.safe_pt2.string_rules`.

Private torch use, with the public route that was tried: ``torch._export.serde.schema`` is the format of a ``.pt2``
file. ``_Union`` is the base of its unions, and ``_SERIALIZE_TO_TORCH_DTYPE`` its table of the numbers of dtypes. No
public module has any of them.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Annotated, Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch._export.serde.union import _Union, _UnionTag

from adaptc.safe_pt2 import string_rules
from adaptc.safe_pt2.refusal import UnsafeFile, shown

__all__ = ["DTYPES", "SchemaBuilder", "schema"]

#: number in a file -> dtype
DTYPES: Mapping[int, torch.dtype] = _SERIALIZE_TO_TORCH_DTYPE

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_MOST_GRAPHS = 6  # nested in one another; torch repeats the text of each in the errors of all around it
_MOST_INSIDE = 50  # unions nested in one another

Build = Callable[[Any], Any]
Class = typing.TypeVar("Class")


class SchemaBuilder:
    """A builder of one file's objects. ``lenient`` says that a later torch wrote the file, whose new fields are left
    out."""

    def __init__(self, lenient: bool = False) -> None:
        self._lenient = lenient
        self._depth = self._inside = 0
        self._known: dict[Any, Build] = {}

    def build(self, cls: type[Class], data: Any) -> Class:
        """Return an object of ``cls`` with this data. Raises UnsafeFile, with the place in the data."""
        try:
            return self._of_class(cls)(data)
        except RecursionError as error:
            raise UnsafeFile("expected a program, found one nested too deeply") from error

    def _of_class(self, cls: Any) -> Build:
        if cls not in self._known:
            # A placeholder comes first, since classes refer to one another.
            self._known[cls] = lambda data: self._known[cls](data)
            self._known[cls] = self._union(cls) if issubclass(cls, _Union) else self._record(cls)
        return self._known[cls]

    def _of_hint(self, hint: Any, owner: str, name: str) -> Build:
        if typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (inner,) = [a for a in args if a is not types.NoneType]
            one = self._of_hint(inner, owner, name)
            return lambda data: None if data is None else one(data)
        if origin is list:
            return _list(self._of_hint(args[0], owner, name))
        if origin is dict:
            return _dict(string_rules.KEYS.get((owner, name)), self._values(args[1], owner, name))
        if hint is str:
            return _text(string_rules.FIELDS.get((owner, name)))
        if hint in _PLAIN:
            return _PLAIN[hint]
        if isinstance(hint, type) and issubclass(hint, IntEnum):
            return _member(hint)
        return self._of_class(hint)

    def _values(self, hint: Any, owner: str, name: str) -> Callable[[str], Build]:
        by_key = string_rules.BY_KEY.get((owner, name))
        if by_key is not None:
            return lambda key: _text(by_key(key))
        one = self._of_hint(hint, owner, name)
        return lambda key: one

    def _union(self, cls: Any) -> Build:
        hints = typing.get_type_hints(cls, globalns=dict(vars(schema)), include_extras=True)
        builds = {f.name: self._of_hint(hints[f.name], cls.__name__, f.name) for f in dataclasses.fields(cls)}
        blank, tags = dict.fromkeys(builds), {kind: _UnionTag.create(kind, cls) for kind in builds}

        def make(data: Any) -> Any:
            if not isinstance(data, dict) or len(data) != 1:
                raise UnsafeFile(f"expected one kind of {cls.__name__}, found {shown(data)}")
            ((kind, value),) = data.items()
            if kind not in builds:
                raise UnsafeFile(f"expected a kind of {cls.__name__}, found {shown(kind)}")
            self._inside += 1
            if self._inside > _MOST_INSIDE:
                raise UnsafeFile("expected a program, found values nested too deeply")
            try:
                built = builds[kind](value)
            except UnsafeFile as error:
                raise error.inside(f".{kind}") from None
            self._inside -= 1
            # The same as cls.create, and ten times as fast, since that lists the fields of the class four times.
            out = object.__new__(cls)
            vars(out).update(blank)
            vars(out)[kind], vars(out)["_type"] = built, tags[kind]
            return out

        return make

    def _record(self, cls: Any) -> Build:
        hints = typing.get_type_hints(cls, globalns=dict(vars(schema)), include_extras=True)
        fields = dataclasses.fields(cls)
        builds = {f.name: self._of_hint(hints[f.name], cls.__name__, f.name) for f in fields}
        needed = {
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        graph = cls is schema.Graph

        def make(data: Any) -> Any:
            if not isinstance(data, dict):
                raise UnsafeFile(f"expected a {cls.__name__}, found {shown(data)}")
            if not data.keys() >= needed:
                raise UnsafeFile(f"a {cls.__name__} lacks {min(needed - data.keys())!r}")
            if not data.keys() <= builds.keys() and not self._lenient:
                raise UnsafeFile(f"a {cls.__name__} has no {shown(min(data.keys() - builds.keys()))}")
            if cls is schema.Node:
                string_rules.spoken(data["inputs"])
            self._depth += graph
            if self._depth > _MOST_GRAPHS:
                raise UnsafeFile(f"expected at most {_MOST_GRAPHS} graphs inside one another")
            values = {}
            for name, build in builds.items():
                if name in data:
                    try:
                        values[name] = build(data[name])
                    except UnsafeFile as error:
                        raise error.inside(f".{name}") from None
            self._depth -= graph
            return cls(**values)

        return make


def _list(one: Build) -> Build:
    def make(data: Any) -> list[Any]:
        if not isinstance(data, list):
            raise UnsafeFile(f"expected a list, found {shown(data)}")
        at = 0
        try:
            out = []
            for at, value in enumerate(data):  # noqa: B007
                out.append(one(value))
            return out
        except UnsafeFile as error:
            raise error.inside(f"[{at}]") from None

    return make


def _dict(check: string_rules.Check | None, of: Callable[[str], Build]) -> Build:
    def make(data: Any) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise UnsafeFile(f"expected an object, found {shown(data)}")
        if data and check is None:
            raise UnsafeFile("this adaptc does not know the field")
        out = {}
        for key, value in data.items():
            try:
                assert check is not None
                out[check(key)] = of(key)(value)
            except UnsafeFile as error:
                raise error.inside(f"[{shown(key)}]") from None
        return out

    return make


def _text(check: string_rules.Check | None) -> Build:
    def make(data: Any) -> str:
        if type(data) is not str:
            raise UnsafeFile(f"expected a text, found {shown(data)}")
        if check is None:
            raise UnsafeFile("this adaptc does not know the field")
        return check(data)

    return make


def _member(cls: type[IntEnum]) -> Build:
    known = {int(m): m.name for m in cls}

    def make(data: Any) -> int:
        if type(data) is not int or data not in known or known[data].lower() == "unknown":
            raise UnsafeFile(f"expected a number of a {cls.__name__}, found {shown(data)}")
        return data

    return make


def _int(data: Any) -> int:
    if type(data) is not int or not -(2**63) <= data < 2**64:
        raise UnsafeFile(f"expected an integer of 64 bits, found {shown(data)}")
    return data


def _bool(data: Any) -> bool:
    if type(data) is not bool:
        raise UnsafeFile(f"expected true or false, found {shown(data)}")
    return data


def _float(data: Any) -> float:
    if type(data) is float:
        return data
    if type(data) is str and data in _FLOATS:
        return _FLOATS[data]
    raise UnsafeFile(f"expected a number with a point, found {shown(data)}")


_PLAIN: dict[Any, Build] = {int: _int, bool: _bool, float: _float}
