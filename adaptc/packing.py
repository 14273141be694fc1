"""Weights of sibling layers in one buffer, so that one product reads them all and none is held twice.

Before: tensors of equal width. After: one tensor of their rows below each other, of which each of them is a view; their
values, and the identity of every ``nn.Parameter``, are what they were. A model shares its parameters with the programs
made of it, so all that are known to share a tensor's memory follow (``alias``), or the old memory would live on.

A model must not run in another thread while its weights are packed: the memory that a running op reads is given up.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from adaptc.passes._lifted import storage_key

_lock = threading.Lock()
#: where memory begins -> tensors that were made to share it; entries are checked when used, for memory is given back
_aliases: dict[int, list[weakref.ref[Tensor]]] = {}


def alias(tensors: Iterable[Tensor]) -> None:
    """Remember that these may share memory with others of the same values, under other objects."""
    with _lock:
        for t in tensors:
            if packable(t):
                known = _aliases.setdefault(_start(t), [])
                known[:] = [r for r in known if (o := r()) is not None and o is not t and _start(o) == _start(t)]
                known.append(weakref.ref(t))


def packable(t: Tensor) -> bool:
    """Whether a tensor may be moved: a plain matrix in memory of this process's own."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.ndim == 2
        and t.numel() > 0
        and t.layout == torch.strided
        and t.device.type != "meta"
        and t.is_contiguous()
        and not t.is_inference()
        and not t.is_shared()
    )


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The buffer, (sum of rows, columns). The tensors become views of it, unless they are already."""
    with _lock, torch.no_grad():
        found = _packed(tensors)
        if found is not None:
            return found
        everyone = [_known(t) for t in tensors]
        # What shares memory with these may have been packed for another program, before they were known to it.
        buffer = torch.cat([t.detach() for t in tensors])
        start = 0
        for t, others in zip(tensors, everyone, strict=True):
            rows = t.shape[0]
            for o in others:
                o.data = buffer[start : start + rows]
            _aliases.setdefault(_start(t), []).extend(map(weakref.ref, others))
            start += rows
        return buffer


def _packed(tensors: Sequence[Tensor]) -> Tensor | None:
    """The buffer they are views of, one below the other."""
    first = tensors[0]
    offset = first.storage_offset()
    for t in tensors:
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or t.storage_offset() != offset:
            return None
        offset += t.numel()
    rows, columns = sum(t.shape[0] for t in tensors), first.shape[1]
    return first.detach().as_strided((rows, columns), (columns, 1), first.storage_offset())


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
