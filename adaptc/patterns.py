"""Compile and match regular expressions that a user or a file wrote, without the risk of a hang.

They have the meaning of Python's ``re``, as in PEFT. ``re`` decides whether an expression is valid; the package
``regex``, which has a timeout, matches it. The two differ on ``\\B`` in an empty string, and on which combining marks
are letters.

:func:`compile_pattern` gives a :class:`Pattern`, or raises a ConfigError that names the option and the expression.
Expressions longer than ``MAX_PATTERN_LENGTH`` are refused, and those that take longer than ``MAX_SECONDS``. All
expressions that are matched in one ``limit_pattern_time`` block share that time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
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
