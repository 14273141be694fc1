"""Compile and match regular expressions that a user or a file wrote, without the risk of a hang.

They have the meaning of Python's ``re``, as in PEFT. ``re`` decides whether an expression is valid; the package
``regex``, which has a timeout, matches it. The two differ on ``\\B`` in an empty string, and on which combining marks
are letters.

:func:`compile_pattern` gives a :class:`Pattern`, or raises a ConfigError that names the option and the expression.
Expressions longer than ``MAX_PATTERN_LENGTH`` are refused, and those that take longer than ``MAX_SECONDS``. All
expressions that are matched in one ``limit_pattern_time`` block share that time.

:func:`pattern_value` looks up an option of one module in a table such as ``rank_pattern``, by PEFT's rule.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TypeVar

import regex

from adaptc.errors import ConfigError, short_repr

T = TypeVar("T")

# Such expressions match in one way only, so Python's own engine, which is faster, cannot hang on them.
_LITERAL_NAME = re.compile(r"(?:[\w.]|\\[.\-_])*")
#: the most characters of one expression, since the time to compile grows with them
MAX_PATTERN_LENGTH = 20_000
#: seconds of the thread's processor time for compiling and matching; a usual expression takes microseconds per name
MAX_SECONDS = 0.5
# Where case is ignored, Python's compiler goes through the characters of a range one by one: long ranges are refused.
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_LONG_RANGE = re.compile(r"-(\\[uUN]|[^\x00-\x7f])")
# Two tokens mean themselves to re and something else to regex: a brace that is no repeat, and a bracket inside a set.
_TOKEN = re.compile(r"\\.|\{(?:\d+(?:,\d*)?|,\d*)\}|.", re.DOTALL)
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")

#: the number of keys of a table below which all are tried one by one
FEW_KEYS = 64
_LITERAL_KEY = re.compile(r"(?:[\w.]|\\\.)+")

_seconds_left: ContextVar[list[float] | None] = ContextVar("adaptc_pattern_seconds", default=None)


@contextmanager
def limit_pattern_time() -> Iterator[None]:
    """Run the block with ``MAX_SECONDS`` for all expressions that it compiles and matches; an inner block shares
    them."""
    if _seconds_left.get() is not None:
        yield
        return
    token = _seconds_left.set([MAX_SECONDS])
    try:
        yield
    finally:
        _seconds_left.reset(token)


class Pattern:
    """A regular expression of ``option``. ``user_text``: the part of it that the user wrote, for messages."""

    def __init__(self, option: str, text: str, user_text: str) -> None:
        self.option, self.pattern, self.user_text = option, text, user_text
        self._regex = self._run_timed(lambda seconds: _compile_regex(text))

    def match(self, name: str) -> Any:
        """Return the match at the start of ``name``, like ``re.Pattern.match``.

        This and the other methods raise ConfigError where the time is up.
        """
        return self._run_timed(self._regex.match, name)

    def fullmatch(self, name: str) -> Any:
        return self._run_timed(self._regex.fullmatch, name)

    def search(self, name: str) -> Any:
        return self._run_timed(self._regex.search, name)

    def subn(self, replacement: str, name: str) -> tuple[str, int]:
        """Return ``name`` with matches replaced, and their number, like ``re.Pattern.subn``.

        Raises ConfigError for a replacement that does not fit the expression.
        """
        try:
            re.compile(self.pattern).subn(replacement, "")  # reads the replacement; there is nothing to search
            return self._run_timed(self._regex.subn, replacement, name)
        except (re.error, regex.error, IndexError, TypeError) as exc:
            raise ConfigError(
                f"{self.option}: {short_repr(replacement)} does not fit {short_repr(self.user_text)}: {exc}"
            ) from exc

    def _run_timed(self, call: Callable[..., T], *args: str) -> T:
        seconds_left = _seconds_left.get() or [MAX_SECONDS]
        start = time.thread_time()
        try:
            if seconds_left[0] <= 0:
                raise TimeoutError
            return call(*args, timeout=seconds_left[0]) if args else call(seconds_left[0])
        except TimeoutError:
            seconds_left[0] = 0  # regex counts by another clock, so some of the thread's own time may be left
            raise ConfigError(
                f"{self.option}: {short_repr(self.user_text)} takes too long to try on the names of modules and "
                f"tensors, {MAX_SECONDS:g} s for all expressions together. Write it without repeats inside repeats, "
                "such as '(a+)+', or name the modules in a list."
            ) from None
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError, Warning) as exc:
            raise ConfigError(
                f"{self.option}: {short_repr(self.user_text)} is not a valid regular expression "
                f"({str(exc) or type(exc)})"
            ) from None
        finally:
            seconds_left[0] -= time.thread_time() - start


def compile_pattern(option: str, text: str, user_text: str | None = None) -> Pattern | re.Pattern[str]:
    """Return the compiled expression ``text`` of ``option``.

    ``user_text``: the part of it that the user wrote, for messages; None for all of it. Raises ConfigError for an
    expression that is not valid or too long, and where the time is up.
    """
    user_text = text if user_text is None else user_text
    if len(user_text) < MAX_PATTERN_LENGTH and _LITERAL_NAME.fullmatch(user_text):
        return re.compile(text)
    return Pattern(option, text, user_text)


@lru_cache(maxsize=4096)
def _compile_regex(text: str) -> Any:
    if len(text) > MAX_PATTERN_LENGTH:
        raise re.error(f"it has {len(text)} characters, and {MAX_PATTERN_LENGTH} are the most")
    if _IGNORES_CASE.search(text) and _LONG_RANGE.search(text):
        raise re.error("it ignores the case of ranges of letters beyond ASCII")
    re.compile(text)
    return regex.compile(_escape_for_regex(text), regex.VERSION0)


def _escape_for_regex(text: str) -> str:
    """Return ``text`` with escapes for the characters that are literal to ``re`` and special to ``regex``.

    Raises re.error where its repeats expand to more than ``MAX_PATTERN_LENGTH`` characters, since ``regex`` allocates
    all of them.
    """
    out: list[str] = []
    set_start = -1  # the index of the first character of the set that is being read, or -1 outside of sets
    group_sizes, last_size = (
        [0],
        0,
    )  # the expanded sizes of the open groups, and of the item that a repeat would apply to
    for match in _TOKEN.finditer(text):
        token = match[0]
        repeat = _REPEAT.fullmatch(token) if set_start < 0 else None
        if set_start >= 0:
            if token == "[":
                token = r"\["
            elif token == "]" and match.start() > set_start:
                set_start = -1
        elif repeat:
            times = max((int(n) for n in repeat.groups() if n), default=1)
            group_sizes[-1] += last_size * (times - 1)
            last_size *= times
            if group_sizes[-1] > MAX_PATTERN_LENGTH:
                raise re.error(f"its repeats stand for more than {MAX_PATTERN_LENGTH} characters")
        elif token == ")" and len(group_sizes) > 1:
            last_size = group_sizes.pop()
            group_sizes[-1] += last_size
        elif token == "(":
            group_sizes.append(1)
        else:
            last_size = 1
            group_sizes[-1] += 1
            if token == "[":
                set_start = match.end() + text.startswith("^", match.end())
            elif token == "{":
                token = r"\{"
        out.append(token)
    return "".join(out)


def pattern_value(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    """Return the value of the first key of ``rank_pattern`` or ``alpha_pattern`` that matches the module ``name``.

    A key is a regular expression for the end of the name, starting at a dot or at the front. Without a match, return
    ``default``. Raises :class:`ConfigError` for a key that is no valid expression.
    """
    if not pattern:
        return default
    keys = pattern if len(pattern) < FEW_KEYS else candidate_keys(tuple(pattern), name)
    return next((pattern[key] for key in keys if matches_pattern(key, name)), default)


@lru_cache(maxsize=8)
def _group_by_ending(keys: tuple[str, ...]) -> Mapping[str, Sequence[int]]:
    """Return the indices of the keys by the literal ending that a name must have to match them."""
    out: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        out.setdefault(_literal_ending(key), []).append(i)
    return out


def candidate_keys(keys: tuple[str, ...], name: str) -> list[str]:
    """Return the keys of a table that may match ``name``, in order: a table with a key for each layer has thousands."""
    places = _group_by_ending(keys)
    return [keys[i] for i in sorted(i for start in range(len(name) + 1) for i in places.get(name[start:], ()))]


def _literal_ending(key: str) -> str:
    return key.rpartition(".")[2] if _LITERAL_KEY.fullmatch(key) else ""


@lru_cache(maxsize=65536)
def _compile_key(key: str) -> tuple[str, Pattern | re.Pattern[str]]:
    """Return a literal ending that every matching name has, a cheap first test, and the regular expression of a key."""
    return _literal_ending(key), compile_pattern("rank_pattern or alpha_pattern", rf"(.*\.)?({key})$", key)


def matches_pattern(key: str, name: str) -> bool:
    """Return whether a key of ``rank_pattern`` or ``alpha_pattern`` matches the module ``name``."""
    ending, expression = _compile_key(key)
    return name.endswith(ending) and expression.match(name) is not None
