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

from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.safe_pt2 import string_rules

__all__ = ["DTYPES", "SchemaBuilder", "schema"]

#: number in a file -> dtype
DTYPES: Mapping[int, torch.dtype] = _SERIALIZE_TO_TORCH_DTYPE

_NONFINITE_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_MAX_GRAPH_DEPTH = 6  # nested in one another; torch repeats the text of each in the errors of all around it
_MAX_UNION_DEPTH = 50  # unions nested in one another

BuildFunction = Callable[[Any], Any]
Class = typing.TypeVar("Class")


class SchemaBuilder:
    """A builder of one file's objects. ``ignore_new_fields`` says that a later torch wrote the file, whose new fields
    are left out."""

    def __init__(self, ignore_new_fields: bool = False) -> None:
        self._ignore_new_fields = ignore_new_fields
        self._graph_depth = self._union_depth = 0
        self._builders: dict[Any, BuildFunction] = {}

    def build(self, cls: type[Class], data: Any) -> Class:
        """Return an object of ``cls`` with this data. Raises UnsafeFile, with the place in the data."""
        try:
            return self._class_builder(cls)(data)
        except RecursionError as error:
            raise UnsafeFile("expected a program, found one nested too deeply") from error

    def _class_builder(self, cls: Any) -> BuildFunction:
        if cls not in self._builders:
            # A placeholder comes first, since classes refer to one another.
            self._builders[cls] = lambda data: self._builders[cls](data)
            self._builders[cls] = self._union_builder(cls) if issubclass(cls, _Union) else self._object_builder(cls)
        return self._builders[cls]

    def _hint_builder(self, hint: Any, owner: str, name: str) -> BuildFunction:
        if typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (inner,) = [a for a in args if a is not types.NoneType]
            one = self._hint_builder(inner, owner, name)
            return lambda data: None if data is None else one(data)
        if origin is list:
            return _list_builder(self._hint_builder(args[0], owner, name))
        if origin is dict:
            return _dict_builder(string_rules.KEY_CHECKS.get((owner, name)), self._value_builder(args[1], owner, name))
        if hint is str:
            return _text_builder(string_rules.FIELD_CHECKS.get((owner, name)))
        if hint in _SCALAR_BUILDERS:
            return _SCALAR_BUILDERS[hint]
        if isinstance(hint, type) and issubclass(hint, IntEnum):
            return _enum_builder(hint)
        return self._class_builder(hint)

    def _value_builder(self, hint: Any, owner: str, name: str) -> Callable[[str], BuildFunction]:
        by_key = string_rules.CHECKS_BY_KEY.get((owner, name))
        if by_key is not None:
            return lambda key: _text_builder(by_key(key))
        one = self._hint_builder(hint, owner, name)
        return lambda key: one

    def _union_builder(self, cls: Any) -> BuildFunction:
        hints = typing.get_type_hints(cls, globalns=dict(vars(schema)), include_extras=True)
        builders = {f.name: self._hint_builder(hints[f.name], cls.__name__, f.name) for f in dataclasses.fields(cls)}
        empty_fields, tags = dict.fromkeys(builders), {kind: _UnionTag.create(kind, cls) for kind in builders}

        def build_union(data: Any) -> Any:
            if not isinstance(data, dict) or len(data) != 1:
                raise UnsafeFile(f"expected one kind of {cls.__name__}, found {short_repr(data)}")
            ((kind, value),) = data.items()
            if kind not in builders:
                raise UnsafeFile(f"expected a kind of {cls.__name__}, found {short_repr(kind)}")
            self._union_depth += 1
            if self._union_depth > _MAX_UNION_DEPTH:
                raise UnsafeFile("expected a program, found values nested too deeply")
            try:
                built = builders[kind](value)
            except UnsafeFile as error:
                raise error.prepend_location(f".{kind}") from None
            self._union_depth -= 1
            # The same as cls.create, and ten times as fast, since that lists the fields of the class four times.
            out = object.__new__(cls)
            vars(out).update(empty_fields)
            vars(out)[kind], vars(out)["_type"] = built, tags[kind]
            return out

        return build_union

    def _object_builder(self, cls: Any) -> BuildFunction:
        hints = typing.get_type_hints(cls, globalns=dict(vars(schema)), include_extras=True)
        fields = dataclasses.fields(cls)
        builders = {f.name: self._hint_builder(hints[f.name], cls.__name__, f.name) for f in fields}
        required = {
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        is_graph = cls is schema.Graph

        def build_object(data: Any) -> Any:
            if not isinstance(data, dict):
                raise UnsafeFile(f"expected a {cls.__name__}, found {short_repr(data)}")
            if not data.keys() >= required:
                raise UnsafeFile(f"a {cls.__name__} lacks {min(required - data.keys())!r}")
            if not data.keys() <= builders.keys() and not self._ignore_new_fields:
                raise UnsafeFile(f"a {cls.__name__} has no {short_repr(min(data.keys() - builders.keys()))}")
            if cls is schema.Node:
                string_rules.clean_assert_messages(data["inputs"])
            self._graph_depth += is_graph
            if self._graph_depth > _MAX_GRAPH_DEPTH:
                raise UnsafeFile(f"expected at most {_MAX_GRAPH_DEPTH} graphs inside one another")
            values = {}
            for name, build in builders.items():
                if name in data:
                    try:
                        values[name] = build(data[name])
                    except UnsafeFile as error:
                        raise error.prepend_location(f".{name}") from None
            self._graph_depth -= is_graph
            return cls(**values)

        return build_object


def _list_builder(item_builder: BuildFunction) -> BuildFunction:
    def build_list(data: Any) -> list[Any]:
        if not isinstance(data, list):
            raise UnsafeFile(f"expected a list, found {short_repr(data)}")
        at = 0
        try:
            out = []
            for at, value in enumerate(data):  # noqa: B007
                out.append(item_builder(value))
            return out
        except UnsafeFile as error:
            raise error.prepend_location(f"[{at}]") from None

    return build_list


def _dict_builder(check: string_rules.TextCheck | None, value_builder: Callable[[str], BuildFunction]) -> BuildFunction:
    def build_dict(data: Any) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise UnsafeFile(f"expected an object, found {short_repr(data)}")
        if data and check is None:
            raise UnsafeFile("this adaptc does not know the field")
        out = {}
        for key, value in data.items():
            try:
                assert check is not None
                out[check(key)] = value_builder(key)(value)
            except UnsafeFile as error:
                raise error.prepend_location(f"[{short_repr(key)}]") from None
        return out

    return build_dict


def _text_builder(check: string_rules.TextCheck | None) -> BuildFunction:
    def build_text(data: Any) -> str:
        if type(data) is not str:
            raise UnsafeFile(f"expected a text, found {short_repr(data)}")
        if check is None:
            raise UnsafeFile("this adaptc does not know the field")
        return check(data)

    return build_text


def _enum_builder(cls: type[IntEnum]) -> BuildFunction:
    known = {int(m): m.name for m in cls}

    def build_member(data: Any) -> int:
        if type(data) is not int or data not in known or known[data].lower() == "unknown":
            raise UnsafeFile(f"expected a number of a {cls.__name__}, found {short_repr(data)}")
        return data

    return build_member


def _check_int(data: Any) -> int:
    if type(data) is not int or not -(2**63) <= data < 2**64:
        raise UnsafeFile(f"expected an integer of 64 bits, found {short_repr(data)}")
    return data


def _check_bool(data: Any) -> bool:
    if type(data) is not bool:
        raise UnsafeFile(f"expected true or false, found {short_repr(data)}")
    return data


def _check_float(data: Any) -> float:
    if type(data) is float:
        return data
    if type(data) is str and data in _NONFINITE_FLOATS:
        return _NONFINITE_FLOATS[data]
    raise UnsafeFile(f"expected a number with a point, found {short_repr(data)}")


_SCALAR_BUILDERS: dict[Any, BuildFunction] = {int: _check_int, bool: _check_bool, float: _check_float}
