"""Check texts of a file that become names, since torch writes them into Python source that it runs.

torch prints a node's name as a variable. A parameter's name becomes an attribute path, with quotes around parts that
are no identifier. Other texts stand inside quotes or after a comment sign. None of them may end what it is printed in.
"""

from __future__ import annotations

import json
import re
from typing import Any

from adaptc.archives.refusal import UnsafeFile, short_repr

# Control characters, and those that Python or C++ may take for the end of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029'\"\\\\{}]")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_LENGTH = 4_096


def word_set(text: str) -> frozenset[str]:
    """Return the words of ``text`` as a set of names."""
    return frozenset(text.split())


def check_identifier(text: str) -> str:
    if not text.isidentifier() or len(text) > _MAX_LENGTH:
        raise UnsafeFile(f"expected a name of letters, digits and underscores, found {short_repr(text)}")
    return text


def check_plain(text: str) -> str:
    """Return ``text``, the path of a parameter or module, or a constant.

    Raises UnsafeFile where it has quotes, backslashes, braces or control characters, or is very long.
    """
    if _NOT_PLAIN.search(text) or len(text) > _MAX_LENGTH:
        raise UnsafeFile(f"expected a text without quotes, backslashes, braces and line ends, found {short_repr(text)}")
    return text


def check_one_line(text: str) -> str:
    if _CONTROL.search(text):
        raise UnsafeFile(f"expected a text of one line, found {short_repr(text)}")
    return text


def clean_message(text: str) -> str:
    """Return a text for people, in which a space replaces every character that could end a comment."""
    return _CONTROL.sub(" ", text)


def clean_lines(text: str) -> str:
    """Return a text for people, which may have several lines, with spaces for other control characters."""
    return _UNPRINTABLE.sub(" ", text)


def parse_json(text: str | bytes, description: str = "JSON", *, allow_nan: bool = False) -> Any:
    """Return the value of a JSON text. Raises UnsafeFile where it is not JSON by its standard.

    NaN is refused unless ``allow_nan``, and so are numbers of thousands of digits and repeated keys.
    """
    constant = float if allow_nan else _refuse_constant
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=constant)
    except RecursionError as error:
        raise UnsafeFile(f"expected {description}, found lists and objects nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UnsafeFile(f"expected {description}: {error}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an object has two entries of one name")
    return out
