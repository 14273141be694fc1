"""Keep the adapters of one request, as they were when the request began.

A request refers to bindings, not to names. So one that runs keeps its adapters when the bank replaces or removes them,
and they are freed with the last request that has them.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary

from adaptc.binding.binding import Binding
from adaptc.locks import reset_after_fork
from adaptc.packages.package_engine import IndexedRows

_NUMBERS: WeakKeyDictionary[Binding, int] = WeakKeyDictionary()
_COUNTER, _LOCK = itertools.count(1), reset_after_fork(threading.Lock())


def binding_key(binding: Binding) -> str:
    """Return a name for ``binding`` that no other binding of this process has, or had."""
    with _LOCK:
        number = _NUMBERS.get(binding)
        if number is None:
            number = _NUMBERS[binding] = next(_COUNTER)
    return str(number)


class RequestAdapter:
    """The adapters of a request: ``mix`` has the weight of each binding in ``adapters``, both by ``binding_key``.

    The base has none. ``name`` is what the request asked for, for messages and metrics. In a package ``indices`` are
    those of the adapters in the code, and nothing else is written there while ``kept`` exists.
    """

    def __init__(
        self, name: str, mix: Mapping[str, float], bindings: Mapping[str, Binding], kept: IndexedRows | None = None
    ) -> None:
        self.name, self.kept = name, kept
        keys = {n: binding_key(bindings[n]) for n in mix}
        self.adapters: Mapping[str, Binding] = {key: bindings[n] for n, key in keys.items()}
        self.indices: Mapping[str, int] = {} if kept is None else {k: kept.index_by_name[n] for n, k in keys.items()}
        weights: dict[str, float] = {}
        for n, weight in mix.items():  # one binding may have several names
            weights[keys[n]] = weights.get(keys[n], 0.0) + weight
        self.mix: Mapping[str, float] = {key: weight for key, weight in weights.items() if weight}

    @property
    def salt(self) -> bytes:
        """Return bytes that differ between requests with different adapters; b"" for the base."""
        if not self.mix:
            return b""
        return hashlib.blake2b(repr(sorted(self.mix.items())).encode()).digest()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: transformers copies the state of a request whose cache it drops or forks."""
        return self

    def __repr__(self) -> str:
        return f"RequestAdapter({self.name!r})"


def salted_tokens(tokens: list[int], salt: bytes, vocabulary: int, page: int) -> list[int]:
    """Return tokens that are equal for equal tokens and salts alone, to hash the blocks of a cache by.

    The first ``page`` tokens carry the salt, each as a multiple of ``vocabulary`` that still fits int32. Tokens without
    a salt stay as they are.
    """
    if not salt:
        return tokens
    digits, rest = (2**31 - 1) // vocabulary, int.from_bytes(salt, "little")
    made: list[int] = []
    for token in tokens[:page]:
        rest, digit = divmod(rest, digits)
        made.append(token + digit * vocabulary)
    return made + tokens[page:]
