"""Check the schema of JSON data: the types of all values inside it, so that code that reads it cannot fail on them."""

from __future__ import annotations

from typing import Any

from adaptc.archives.refusal import UnsafeFile, short_repr


class DictOf:
    """The schema of an object with any keys, whose values all have one schema."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema


class Nullable(DictOf):
    """The schema of a value that may be null."""


class OptionalField(DictOf):
    """The schema of a field that may be left out."""


class Size:
    """The schema of a size or of an axis number: an int from 0 to 2**63 - 1."""


def check_json(value: Any, schema: Any) -> None:
    """Raise UnsafeFile, with the place, where ``value`` does not have this schema.

    A schema is a type or a tuple of types. A list has the schema of its items, and a dict the schemas of exactly these
    fields.
    """
    if isinstance(schema, Nullable):
        if value is not None:
            check_json(value, schema.schema)
    elif isinstance(schema, DictOf):
        if not isinstance(value, dict):
            raise UnsafeFile(f"expected an object, found {short_repr(value)}")
        for key, v in value.items():
            _check_inside(f"[{short_repr(key)}]", v, schema.schema)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise UnsafeFile(f"expected a list, found {short_repr(value)}")
        for at, v in enumerate(value):
            _check_inside(f"[{at}]", v, schema[0])
    elif isinstance(schema, dict):
        needed = {key for key, inner in schema.items() if not isinstance(inner, OptionalField)}
        if not isinstance(value, dict) or not needed <= value.keys() <= schema.keys():
            raise UnsafeFile(f"expected an object of {', '.join(schema)}, found {short_repr(value)}")
        for key, v in value.items():
            inner = schema[key]
            _check_inside(f".{key}", v, inner.schema if isinstance(inner, OptionalField) else inner)
    elif isinstance(schema, tuple):
        if not any(_has_type(value, f) for f in schema):
            raise UnsafeFile(f"expected {' or '.join(_type_name(f) for f in schema)}, found {short_repr(value)}")
    elif not _has_type(value, schema):
        raise UnsafeFile(f"expected {_type_name(schema)}, found {short_repr(value)}")


def _check_inside(location: str, value: Any, schema: Any) -> None:
    try:
        check_json(value, schema)
    except UnsafeFile as error:
        raise error.prepend_location(location) from None


def _has_type(value: Any, schema: type) -> bool:
    if schema is Size:
        return type(value) is int and 0 <= value < 2**63
    return schema is object or type(value) is schema


def _type_name(schema: type) -> str:
    names = {Size: "a size", int: "an integer", float: "a number with a point", str: "a text", bool: "true or false"}
    return names.get(schema, f"a {schema.__name__}")
