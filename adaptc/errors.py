"""Every error and warning adaptc raises.

A message names the key, the site, what was expected, what was found, and what to do next. Callers can rely on two
things: every failure of adaptc is an :class:`AdaptcError`, and a call that raised one changed nothing.
"""

from __future__ import annotations

import difflib
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sized
from itertools import islice


class AdaptcError(Exception):
    """Base class of all adaptc errors."""


class CaptureError(AdaptcError):
    """The model could not be captured as an exported program."""


class ConfigError(AdaptcError, ValueError):
    """A config holds a value, or a combination of values, that cannot be honoured."""


class MethodError(AdaptcError):
    """A method of a user's own does not keep what the protocol promises (see examples/writing_methods.md)."""


class TargetError(AdaptcError, ValueError):
    """A target entry binds to no site, or to one the method has no meaning for."""


class CheckpointError(AdaptcError):
    """An adapter file is missing, damaged, unsafe, or does not fit the program."""


class SwapError(AdaptcError):
    """An adapter cannot be bound to the sites the program was compiled with."""


class MergeError(AdaptcError):
    """A merge is not defined, not finite, or cannot be undone."""


class PassError(AdaptcError):
    """A pass left a program that is not valid: a bug in the pass, never in the model."""


class BackendError(AdaptcError):
    """A backend is unknown, unavailable, or failed to compile the program."""


class RecompileError(AdaptcError, AssertionError):
    """A guarded block compiled something although it promised not to."""


class AdaptcWarning(UserWarning):
    """Something worth knowing that does not change the meaning of a program."""


#: what is told that an entry of a config binds to nothing
Tell = Callable[[str], None]


def refuse_entry(message: str) -> None:
    """Of a config that is being written: it is misspelled. Raises TargetError."""
    raise TargetError(message)


def warn_of_entry(message: str) -> None:
    """Of the config of a file: the adapter is what its tensors are, and each of those is bound all the same."""
    warnings.warn(f"the adapter's config has what binds to nothing here: {message}", AdaptcWarning, stacklevel=3)


#: how many candidates a misspelled name is compared with, and how much of it: comparing takes long
SEARCHED, LONGEST = 20_000, 300


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The candidates a user most likely meant by ``name``: by spelling, of all of it, or of as many of a candidate's
    last components, or of the last one."""
    pool = list(dict.fromkeys(islice(candidates, SEARCHED)))
    name = name[:LONGEST]
    close = difflib.get_close_matches(name, pool, n=n, cutoff=0.75)
    for parts, cutoff in ((name.count(".") + 1, 0.75), (1, 0.5)):
        ends: dict[str, str] = {}
        for c in pool:
            ends.setdefault(".".join(c.split(".")[-parts:]), c)
        wanted = ".".join(name.split(".")[-parts:])
        found = difflib.get_close_matches(wanted, list(ends), n=n, cutoff=cutoff)
        close.extend(ends[f] if "." in name else f for f in found)
    return list(dict.fromkeys(close))[:n]


#: how many wrong entries a message names before it counts the others
SHOWN = 3


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """ "; nearest are ...", for the end of a message; '' when nothing is near."""
    close = nearest(name, candidates)
    return f"; nearest are {listing(map(repr, close))}" if close else ""


def listing(items: Iterable[object], most: int = 8) -> str:
    """The first ``most`` items, and how many there are when these are not all."""
    shown = [str(i) for i in items]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)} in all)" if len(shown) > most else "")


def and_more(items: Sized) -> str:
    """ "; and 4 more" where a message has named the first ``SHOWN`` of ``items``; '' where that was all."""
    rest = len(items) - SHOWN
    return f"; and {rest} more" if rest > 0 else ""


class _Short(reprlib.Repr):
    """``repr`` of anything, from any depth, of any length, and of objects that cannot say what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write down numbers of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


#: ``repr`` for messages: short for every value, and never an error
shown = _Short().repr
