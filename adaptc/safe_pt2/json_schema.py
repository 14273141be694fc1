"""Check the form of JSON data: the types of all values inside it, so that code that reads it cannot fail on them."""

from __future__ import annotations

from typing import Any

from adaptc.safe_pt2.refusal import UnsafeFile, shown


class Each:
    """The form of an object with any keys, whose values all have one form."""

    def __init__(self, form: Any) -> None:
        self.form = form


class Maybe(Each):
    """The form of a value that may be null."""


class Option(Each):
    """The form of a field that may be left out."""


class Length:
    """The form of a size or of an axis number: an int from 0 to 2**63 - 1."""


def check(value: Any, form: Any) -> None:
    """Raise UnsafeFile, with the place, where ``value`` does not have this form.

    A form is a type or a tuple of types. A list has the form of its items, and a dict the forms of exactly these
    fields.
    """
    if isinstance(form, Maybe):
        if value is not None:
            check(value, form.form)
    elif isinstance(form, Each):
        if not isinstance(value, dict):
            raise UnsafeFile(f"expected an object, found {shown(value)}")
        for key, v in value.items():
            _inside(f"[{shown(key)}]", v, form.form)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise UnsafeFile(f"expected a list, found {shown(value)}")
        for at, v in enumerate(value):
            _inside(f"[{at}]", v, form[0])
    elif isinstance(form, dict):
        needed = {key for key, inner in form.items() if not isinstance(inner, Option)}
        if not isinstance(value, dict) or not needed <= value.keys() <= form.keys():
            raise UnsafeFile(f"expected an object of {', '.join(form)}, found {shown(value)}")
        for key, v in value.items():
            inner = form[key]
            _inside(f".{key}", v, inner.form if isinstance(inner, Option) else inner)
    elif isinstance(form, tuple):
        if not any(_is(value, f) for f in form):
            raise UnsafeFile(f"expected {' or '.join(_name(f) for f in form)}, found {shown(value)}")
    elif not _is(value, form):
        raise UnsafeFile(f"expected {_name(form)}, found {shown(value)}")


def _inside(step: str, value: Any, form: Any) -> None:
    try:
        check(value, form)
    except UnsafeFile as error:
        raise error.inside(step) from None


def _is(value: Any, form: type) -> bool:
    if form is Length:
        return type(value) is int and 0 <= value < 2**63
    return form is object or type(value) is form


def _name(form: type) -> str:
    names = {Length: "a size", int: "an integer", float: "a number with a point", str: "a text", bool: "true or false"}
    return names.get(form, f"a {form.__name__}")
