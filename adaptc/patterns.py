"""Compile and match regular expressions that a user or a file wrote, without the risk of a hang.

They have the meaning of Python's ``re``, as in PEFT. ``re`` decides whether an expression is valid; the package
``regex``, which has a timeout, matches it. The two differ on ``\\B`` in an empty string, and on which combining marks
are letters.

:func:`compiled` gives a :class:`Pattern`, or raises a ConfigError that names the option and the expression. Expressions
longer than ``LONGEST`` are refused, and those that take longer than ``SECONDS``. All expressions that are matched in
one ``limited`` block share that time.
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

from adaptc.errors import ConfigError, shown

T = TypeVar("T")

# Such expressions match in one way only, so Python's own engine, which is faster, cannot hang on them.
_PLAIN = re.compile(r"(?:[\w.]|\\[.\-_])*")
#: the most characters of one expression, since the time to compile grows with them
LONGEST = 20_000
#: seconds of the thread's processor time for compiling and matching; a usual expression takes microseconds per name
SECONDS = 0.5
# Where case is ignored, Python's compiler goes through the characters of a range one by one: long ranges are refused.
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_LONG_RANGE = re.compile(r"-(\\[uUN]|[^\x00-\x7f])")
# Two tokens mean themselves to re and something else to regex: a brace that is no repeat, and a bracket inside a set.
_TOKEN = re.compile(r"\\.|\{(?:\d+(?:,\d*)?|,\d*)\}|.", re.DOTALL)
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")

_left: ContextVar[list[float] | None] = ContextVar("adaptc_pattern_seconds", default=None)


@contextmanager
def limited() -> Iterator[None]:
    """Run the block with ``SECONDS`` for all expressions that it compiles and matches; an inner block shares them."""
    if _left.get() is not None:
        yield
        return
    token = _left.set([SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


class Pattern:
    """A regular expression of ``option``. ``written``: the part of it that the user wrote, for messages."""

    def __init__(self, option: str, text: str, written: str) -> None:
        self.option, self.pattern, self.written = option, text, written
        self._regex = self._timed(lambda seconds: _compiled(text))

    def match(self, name: str) -> Any:
        """Return the match at the start of ``name``, like ``re.Pattern.match``.

        This and the other methods raise ConfigError where the time is up.
        """
        return self._timed(self._regex.match, name)

    def fullmatch(self, name: str) -> Any:
        return self._timed(self._regex.fullmatch, name)

    def search(self, name: str) -> Any:
        return self._timed(self._regex.search, name)

    def subn(self, replacement: str, name: str) -> tuple[str, int]:
        """Return ``name`` with matches replaced, and their number, like ``re.Pattern.subn``.

        Raises ConfigError for a replacement that does not fit the expression.
        """
        try:
            re.compile(self.pattern).subn(replacement, "")  # reads the replacement; there is nothing to search
            return self._timed(self._regex.subn, replacement, name)
        except (re.error, regex.error, IndexError, TypeError) as exc:
            raise ConfigError(f"{self.option}: {shown(replacement)} does not fit {shown(self.written)}: {exc}") from exc

    def _timed(self, call: Callable[..., T], *args: str) -> T:
        left = _left.get() or [SECONDS]
        start = time.thread_time()
        try:
            if left[0] <= 0:
                raise TimeoutError
            return call(*args, timeout=left[0]) if args else call(left[0])
        except TimeoutError:
            raise ConfigError(
                f"{self.option}: {shown(self.written)} takes too long to try on the names of modules and tensors, "
                f"{SECONDS:g} s for all expressions together. Write it without repeats inside repeats, such as "
                "'(a+)+', or name the modules in a list."
            ) from None
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError, Warning) as exc:
            raise ConfigError(
                f"{self.option}: {shown(self.written)} is not a valid regular expression ({str(exc) or type(exc)})"
            ) from None
        finally:
            left[0] -= time.thread_time() - start


def compiled(option: str, text: str, written: str | None = None) -> Pattern | re.Pattern[str]:
    """Return the compiled expression ``text`` of ``option``.

    ``written``: the part of it that the user wrote, for messages; None for all of it. Raises ConfigError for an
    expression that is not valid or too long, and where the time is up.
    """
    written = text if written is None else written
    if len(written) < LONGEST and _PLAIN.fullmatch(written):
        return re.compile(text)
    return Pattern(option, text, written)


@lru_cache(maxsize=4096)
def _compiled(text: str) -> Any:
    if len(text) > LONGEST:
        raise re.error(f"it has {len(text)} characters, and {LONGEST} are the most")
    if _IGNORES_CASE.search(text) and _LONG_RANGE.search(text):
        raise re.error("it ignores the case of ranges of letters beyond ASCII")
    re.compile(text)
    return regex.compile(_same_to_regex(text), regex.VERSION0)


def _same_to_regex(text: str) -> str:
    """Return ``text`` with escapes for the characters that are literal to ``re`` and special to ``regex``.

    Raises re.error where its repeats expand to more than ``LONGEST`` characters, since ``regex`` allocates all of them.
    """
    out: list[str] = []
    opened = -1  # the index of the first character of the set that is being read, or -1 outside of sets
    sizes, last = [0], 0  # the expanded sizes of the open groups, and of the item that a repeat would apply to
    for found in _TOKEN.finditer(text):
        token = found[0]
        repeat = _REPEAT.fullmatch(token) if opened < 0 else None
        if opened >= 0:
            if token == "[":
                token = r"\["
            elif token == "]" and found.start() > opened:
                opened = -1
        elif repeat:
            times = max((int(n) for n in repeat.groups() if n), default=1)
            sizes[-1] += last * (times - 1)
            last *= times
            if sizes[-1] > LONGEST:
                raise re.error(f"its repeats stand for more than {LONGEST} characters")
        elif token == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif token == "(":
            sizes.append(1)
        else:
            last = 1
            sizes[-1] += 1
            if token == "[":
                opened = found.end() + text.startswith("^", found.end())
            elif token == "{":
                token = r"\{"
        out.append(token)
    return "".join(out)
