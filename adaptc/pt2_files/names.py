"""Which texts of a file may become a name, because torch writes them into Python source that it runs.

A node's name is printed as a variable, a parameter's as an attribute path with quotes around what is no identifier, and
other texts inside quotes or behind a comment sign. None of them may end what it is printed in.
"""

from __future__ import annotations

import json
import re
from typing import Any

from adaptc.pt2_files.refusal import Refused, shown

# Control characters, and what Python or C++ may take for the end of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029'\"\\\\{}]")
_BREAKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 4_096


def words(text: str) -> frozenset[str]:
    """A table of names."""
    return frozenset(text.split())


def identifier(text: str) -> str:
    if not text.isidentifier() or len(text) > _LONGEST:
        raise Refused(f"expected a name of letters, digits and underscores, found {shown(text)}")
    return text


def plain(text: str) -> str:
    """A parameter's or a module's path, or a constant: anything but quotes, backslashes, braces and control signs."""
    if _NOT_PLAIN.search(text) or len(text) > _LONGEST:
        raise Refused(f"expected a text without quotes, backslashes, braces and line ends, found {shown(text)}")
    return text


def one_line(text: str) -> str:
    if _CONTROL.search(text):
        raise Refused(f"expected a text of one line, found {shown(text)}")
    return text


def message(text: str) -> str:
    """Words for people: what could end a comment becomes a space."""
    return _CONTROL.sub(" ", text)


def lines(text: str) -> str:
    """Words for people, on several lines."""
    return _BREAKS.sub(" ", text)


def loads(text: str | bytes, what: str = "JSON", *, infinite: bool = False) -> Any:
    """JSON as its standard has it: a NaN is none unless ``infinite``, nor is a number of thousands of digits."""
    constant = float if infinite else _no_constant
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=constant)
    except RecursionError as error:
        raise Refused(f"expected {what}, found lists and objects nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise Refused(f"expected {what}: {error}") from error


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an object has two entries of one name")
    return out
