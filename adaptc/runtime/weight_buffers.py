"""Move the weights of sibling layers into one buffer, so that one matmul reads them all and no weight is held twice.

Tensors of equal width become views of one tensor with their rows below each other. Their values, and the identity of
every ``nn.Parameter``, stay what they were. A model shares its parameters with the programs made of it. So all tensors
known to share a weight's memory (``remember_tensors``) move with it, or the old memory would live on. Each tensor gets
a storage of its own over its part of the buffer (DLPack makes it). Writers of files look at storages: they would take a
slice of one storage for the whole.

Memory must not be freed while another thread reads it. A program's calls say when they begin and end. Memory that was
given up stays until all calls that had begun by then have ended. A model that is called itself says nothing. It must
not run in another thread while a program of it is called for the first time.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.locks import reset_after_fork
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.storage import storage_key

_lock = reset_after_fork(threading.Lock())
#: address of memory -> tensors that share it; entries are checked when used, for other tensors may lie there by now
_aliases: dict[int, list[weakref.ref[Tensor]]] = {}
#: the number of entries above which those of dead tensors are dropped
MAX_ALIASES = 1024
_alias_limit = [MAX_ALIASES]
#: address of a buffer -> the buffer, while somebody holds it
_buffers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class Reading:
    """The mark of a call that reads weights: its thread, and the number of moves there had been when it began.

    A call holds its mark. Where an interrupt keeps it from :func:`end_reading`, the mark goes with the call.
    """

    __slots__ = ("__weakref__", "number", "since", "thread")

    def __init__(self) -> None:
        self.number, self.thread, self.since = next(_readers.numbers), get_ident(), _readers.moves


class _Readers:
    """The calls that are running, by number, and the old memory that they may still read.

    ``old_memory`` has (the number of a move, the memory that it gave up).
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.calls: weakref.WeakValueDictionary[int, Reading] = weakref.WeakValueDictionary()
        self.moves = 0
        self.old_memory: list[tuple[int, list[Tensor]]] = []


_readers = _Readers()


def begin_reading() -> Reading:
    """Return the mark of a call that reads weights until :func:`end_reading`."""
    mark = Reading()
    _readers.calls[mark.number] = mark
    return mark


def end_reading(mark: Reading) -> None:
    """Drop the mark of a call that has ended, and the old memory that nobody reads any more."""
    _readers.calls.pop(mark.number, None)
    if _readers.old_memory:
        with _lock:
            _free_old_memory()


def _free_old_memory() -> None:
    """Drop old memory that no other thread can be reading: a call reads only memory in use since it began."""
    me = get_ident()
    calls = [c for ref in _readers.calls.valuerefs() if (c := ref()) is not None]
    first = min((c.since for c in calls if c.thread != me), default=math.inf)
    _readers.old_memory = [(n, memory) for n, memory in _readers.old_memory if n >= first]


def remember_tensors(tensors: Iterable[Tensor]) -> None:
    """Remember these tensors, so that :func:`move_into_buffer` moves them along with other tensors of the same
    memory."""
    with _lock:
        for t in tensors:
            if is_packable(t):
                known = _aliases.setdefault(_address(t), [])
                known[:] = [r for r in known if (o := r()) is not None and o is not t and _address(o) == _address(t)]
                known.append(weakref.ref(t))
        _forget_dead()


def _forget_dead(*, at_once: bool = False) -> None:
    """Drop the entries of dead tensors, if many entries have come since the last time, or in any case if
    ``at_once``."""
    if at_once or len(_aliases) > _alias_limit[0]:
        for start, refs in list(_aliases.items()):
            refs[:] = [r for r in refs if r() is not None]
            if not refs:
                del _aliases[start]
        _alias_limit[0] = max(MAX_ALIASES, 2 * len(_aliases))


def forget_dead_tensors() -> int:
    """Drop the entries of dead tensors now, and return how many entries are left."""
    with _lock:
        _forget_dead(at_once=True)
        return len(_aliases)


def is_packable(t: Tensor) -> bool:
    """Return whether a tensor may be moved: a plain contiguous matrix in memory of this process's own."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.ndim == 2
        and t.numel() > 0
        and t.is_floating_point()
        and t.itemsize > 1
        and t.layout == torch.strided
        and t.device.type in ("cpu", "cuda")
        and t.is_contiguous()
        and not t.is_inference()
        and not t.is_shared()
    )


def move_into_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """Move the tensors into one buffer, unless they lie in one already, and return it: (sum of rows, columns)."""
    with _lock, torch.no_grad():
        found = _find_buffer(tensors)
        if found is not None:
            return found
        old_tensors: list[Tensor] = []
        everyone = [_tensors_sharing(t) for t in tensors]
        buffer = torch.cat([t.detach() for t in tensors])
        start = 0
        for t, others in zip(tensors, everyone, strict=True):
            rows = t.shape[0]
            for o in others:
                old_tensors.append(o.detach())
                o.data = torch.from_dlpack(buffer[start : start + rows])
            _aliases.setdefault(_address(t), []).extend(map(weakref.ref, others))
            start += rows
        _buffers[_address(buffer)] = buffer
        _readers.old_memory.append((_readers.moves, old_tensors))
        _readers.moves += 1
        del old_tensors
        _free_old_memory()
        _forget_dead()
        return buffer


def find_buffer(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the buffer that the tensors lie in, one below the other and nothing else; None where there is none."""
    with _lock:
        return _find_buffer(tensors)


def _find_buffer(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return what :func:`find_buffer` does, for a caller that holds the lock."""
    buffer = _buffers.get(_address(tensors[0]))
    end = _address(tensors[0])
    for t in tensors:
        if _address(t) != end:
            return None
        end += t.nbytes
    return buffer if buffer is not None and end == _address(buffer) + buffer.nbytes else None


def _tensors_sharing(t: Tensor) -> list[Tensor]:
    key = storage_key(t)
    found = {id(t): t}
    for ref in _aliases.get(_address(t), ()):
        o = ref()
        if o is not None and is_packable(o) and storage_key(o) == key:
            found[id(o)] = o
    return list(found.values())


def _address(t: Tensor) -> int:
    return t.data_ptr()


class SiblingBuffers:
    """The buffers that the variants of one program read sibling weights from.

    ``base`` maps FQNs to base tensors. ``siblings_of`` returns, for a variant, the FQNs of the weights of each buffer.
    """

    def __init__(self, base: Mapping[str, Any], siblings_of: Callable[[str], list[list[str]]]) -> None:
        self._base, self._siblings_of = base, siblings_of
        self._known: dict[str, list[list[str]]] = {}

    def _siblings(self, variant_name: str) -> list[list[str]]:
        found = self._known.get(variant_name)
        if found is None:
            found = self._known[variant_name] = self._siblings_of(variant_name)
        return found

    def move(self, variant_name: str, own_names: Collection[str]) -> list[Tensor | None]:
        """Return the buffers of one variant, and move the weights into them.

        An entry is None, and nothing moves, where a member is in ``own_names``: the tensors of a base that only one
        binding has.
        """
        buffers: list[Tensor | None] = []
        for members in self._siblings(variant_name):
            if not set(own_names).isdisjoint(members):
                buffers.append(None)
                continue
            tensors = [self._base[m] for m in members]
            found = find_buffer(tensors)
            if found is None:
                with hold_graph_lock():  # whoever reads weights for long, as a save does, holds this lock too
                    found = move_into_buffer(tensors)
            buffers.append(found)
        return buffers

    def are_current(self, variant_name: str, buffers: Sequence[Tensor | None]) -> bool:
        """Return whether the sibling weights of a variant still lie in the buffers that :meth:`move` gave."""
        pairs = zip(self._siblings(variant_name), buffers, strict=True)
        return all(b is None or find_buffer([self._base[m] for m in members]) is b for members, b in pairs)
