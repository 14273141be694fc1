"""Define every error and warning that adaptc raises, and the helpers that word their messages.

A message names the key, the site, what was expected, what was found, and what to do next. Callers can rely on two
things: every failure of adaptc is an :class:`AdaptcError`, and a call that raised one changed nothing.
"""

from __future__ import annotations

import difflib
import reprlib
import warnings
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import contextmanager
from itertools import islice


class AdaptcError(Exception):
    """The base class of all adaptc errors."""


class CaptureError(AdaptcError):
    """An error for a model that cannot be captured as an exported program."""


class ConfigError(AdaptcError, ValueError):
    """An error for a config with a value, or a combination of values, that cannot be honoured."""


class MethodError(AdaptcError):
    """An error for a user's own method that breaks a promise of the protocol (see examples/writing_methods.md)."""


class TargetError(AdaptcError, ValueError):
    """An error for a target entry that binds to no site, or to a site for which the method has no meaning."""


class CheckpointError(AdaptcError):
    """An error for an adapter file that is missing, damaged or unsafe, or does not fit the program."""


class SwapError(AdaptcError):
    """An error for an adapter that cannot be bound to the sites that the program was compiled with."""


class MergeError(AdaptcError):
    """An error for a merge that is not defined or not finite, or that cannot be undone."""


class FilePlaceError(MergeError):
    """An error for a merge whose result has no place in the files of the model, and has one in a program."""


class PassError(AdaptcError):
    """An error for a pass that left an invalid program: a bug in the pass, never in the model."""


class BackendError(AdaptcError):
    """An error for a backend that is unknown or unavailable, or that failed to compile the program."""


class RecompileError(AdaptcError, AssertionError):
    """An error for a guarded block that compiled something although it must not."""


class AdaptcWarning(UserWarning):
    """A warning that is worth knowing and does not change the meaning of a program."""


#: a function that is called with the message that an entry of a config binds to nothing
EntryHandler = Callable[[str], None]


def refuse_entry(message: str) -> None:
    """Raise TargetError for an entry that binds to nothing: in a config that a user writes, it is misspelled."""
    raise TargetError(message)


def warn_of_entry(message: str) -> None:
    """Warn of an entry that binds to nothing in the config of a file, whose tensors are all bound all the same."""
    warnings.warn(f"the adapter's config has what binds to nothing here: {message}", AdaptcWarning, stacklevel=3)


#: how many candidates a misspelled name is compared with, and how many characters of it: comparing is slow
MAX_CANDIDATES, MAX_NAME_LENGTH = 20_000, 300


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the candidates that a user most likely meant by ``name``, at most ``n``.

    Spellings are compared in whole, then as far as ``name`` has dotted components at a candidate's end, then by the
    last component.
    """
    pool = list(dict.fromkeys(islice(candidates, MAX_CANDIDATES)))
    name = name[:MAX_NAME_LENGTH]
    close = difflib.get_close_matches(name, pool, n=n, cutoff=0.75)
    for component_count, cutoff in ((name.count(".") + 1, 0.75), (1, 0.5)):
        ends: dict[str, str] = {}
        for c in pool:
            ends.setdefault(".".join(c.split(".")[-component_count:]), c)
        wanted = ".".join(name.split(".")[-component_count:])
        found = difflib.get_close_matches(wanted, list(ends), n=n, cutoff=cutoff)
        close.extend(ends[f] if "." in name else f for f in found)
    return list(dict.fromkeys(close))[:n]


#: how many wrong entries a message names before it counts the others
MAX_LISTED = 3


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; nearest are ..." for the end of a message; '' where no candidate is near."""
    close = nearest(name, candidates)
    return f"; nearest are {listing(map(repr, close))}" if close else ""


def listing(items: Iterable[object], limit: int = 8) -> str:
    """Return the first ``limit`` items, and the number of all where there are more."""
    texts = [str(i) for i in items]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts)} in all)" if len(texts) > limit else "")


def and_more(items: Sized) -> str:
    """Return "; and 4 more" for a message that has named the first ``MAX_LISTED`` of ``items``; '' where that was
    all."""
    rest = len(items) - MAX_LISTED
    return f"; and {rest} more" if rest > 0 else ""


@contextmanager
def errors_name(site: str) -> Generator[None]:
    """Run the block so that its AdaptcErrors begin with the name of the site."""
    try:
        yield
    except AdaptcError as error:
        raise type(error)(f"{site!r}: {error}") from None


class _Short(reprlib.Repr):
    """A ``repr`` that is short for values of any depth and length, and works for objects whose own ``repr`` fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write down numbers of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


#: ``repr`` for messages: short for every value, and never an error
short_repr = _Short().repr
