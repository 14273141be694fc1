"""Weights of sibling layers in one buffer, so that one product reads them all and none is held twice.

Before: tensors of equal width. After: one tensor of their rows below each other, in whose memory each of them lies;
their values, and the identity of every ``nn.Parameter``, are what they were. A model shares its parameters with the
programs made of it, so all that are known to share a tensor's memory follow (``alias``), or the old memory would live
on. Each tensor has a storage of its own over its part of the memory (DLPack makes it): writers of files look at
storages, and would take a slice for the whole.

What another thread reads must not go while it reads: a program's calls say when they begin and end, and memory that
was given up stays until all calls that had begun by then have ended. A model that runs in another thread by itself says
nothing; it must not run while a program of it is called for the first time.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from threading import get_ident

import torch
from torch import Tensor, nn

from adaptc.locks import free_in_children
from adaptc.passes.ir.storage import storage_key

_lock = free_in_children(threading.Lock())
#: where memory begins -> tensors that were made to share it; entries are checked when used, for memory is given back
_aliases: dict[int, list[weakref.ref[Tensor]]] = {}
#: entries from which on those of tensors that are gone are looked for
MOST = 1024
_bound = [MOST]
#: where the memory of a buffer begins -> the buffer, while somebody holds it
_buffers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class _Readers:
    """``calls``: thread -> how many moves there had been when its call began. ``old``: (which move it was, the memory
    given up by it), while somebody may read it."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.moves = 0
        self.old: list[tuple[int, list[Tensor]]] = []


_readers = _Readers()


def begin_reading() -> bool:
    """This thread reads weights until :func:`end_reading`; False where it does already."""
    me = get_ident()
    if me in _readers.calls:
        return False
    _readers.calls[me] = _readers.moves
    return True


def end_reading() -> None:
    del _readers.calls[get_ident()]
    if _readers.old:
        with _lock:
            _give_back()


def _give_back() -> None:
    """Drop memory that nobody can be reading: each call reads what lay there when it began, or later."""
    me = get_ident()
    first = min((n for thread, n in list(_readers.calls.items()) if thread != me), default=math.inf)
    _readers.old = [(n, memory) for n, memory in _readers.old if n >= first]


def alias(tensors: Iterable[Tensor]) -> None:
    """Remember that these may share memory with others of the same values, under other objects."""
    with _lock:
        for t in tensors:
            if packable(t):
                known = _aliases.setdefault(_start(t), [])
                known[:] = [r for r in known if (o := r()) is not None and o is not t and _start(o) == _start(t)]
                known.append(weakref.ref(t))
        _forget_dead()


def _forget_dead(*, now: bool = False) -> None:
    """Drop the entries of tensors that are gone, if many have come since this was last done."""
    if now or len(_aliases) > _bound[0]:
        for start, refs in list(_aliases.items()):
            refs[:] = [r for r in refs if r() is not None]
            if not refs:
                del _aliases[start]
        _bound[0] = max(MOST, 2 * len(_aliases))


def tidy() -> int:
    """Drop the entries of tensors that are gone now; how many are left."""
    with _lock:
        _forget_dead(now=True)
        return len(_aliases)


def packable(t: Tensor) -> bool:
    """Whether a tensor may be moved: a plain matrix in memory of this process's own."""
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


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The buffer, (sum of rows, columns). The tensors move into it, unless they lie there already."""
    with _lock, torch.no_grad():
        found = _packed(tensors)
        if found is not None:
            return found
        old: list[Tensor] = []
        everyone = [_known(t) for t in tensors]
        buffer = torch.cat([t.detach() for t in tensors])
        start = 0
        for t, others in zip(tensors, everyone, strict=True):
            rows = t.shape[0]
            for o in others:
                old.append(o.detach())
                o.data = torch.from_dlpack(buffer[start : start + rows])
            _aliases.setdefault(_start(t), []).extend(map(weakref.ref, others))
            start += rows
        _buffers[_start(buffer)] = buffer
        _readers.old.append((_readers.moves, old))
        _readers.moves += 1
        del old
        _give_back()
        _forget_dead()
        return buffer


def packed(tensors: Sequence[Tensor]) -> Tensor | None:
    """The buffer they lie in already, if they do."""
    with _lock:
        return _packed(tensors)


def _packed(tensors: Sequence[Tensor]) -> Tensor | None:
    """The buffer they lie in, one below the other and nothing else."""
    buffer = _buffers.get(_start(tensors[0]))
    end = _start(tensors[0])
    for t in tensors:
        if _start(t) != end:
            return None
        end += t.nbytes
    return buffer if buffer is not None and end == _start(buffer) + buffer.nbytes else None


def _known(t: Tensor) -> list[Tensor]:
    key = storage_key(t)
    found = {id(t): t}
    for ref in _aliases.get(_start(t), ()):
        o = ref()
        if o is not None and packable(o) and storage_key(o) == key:
            found[id(o)] = o
    return list(found.values())


def _start(t: Tensor) -> int:
    return t.data_ptr()
