"""safetensors files mapped into memory, by layouts that are known: where in the file each tensor lies.

Before: a path somebody gave us. After: tensors whose data is still on disk, each a view of one private map (writing to
one never reaches the file), or the CheckpointError of :func:`adaptc.peft_files.safe_io.load_safetensors`.

A header is judged by the safetensors library alone. What it made of one is remembered under a digest of the header's
bytes and the size of the file, on which alone its answer rests; the next file with that header is mapped without being
parsed. Adapters of one structure that were written by one program have one header.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.peft_files.safe_io import load_safetensors

#: layouts kept; the one not used for longest goes first
MOST = 32
#: longest header whose layout is kept, some ten thousand tensors
LONGEST = 1 << 20


@dataclass(frozen=True)
class Layout:
    """``tensors``: (key, dtype, shape, first byte, elements); ``runs``: (dtype, first byte, elements) of all floating
    data."""

    tensors: tuple[tuple[str, torch.dtype, torch.Size, int, int], ...]
    runs: tuple[tuple[torch.dtype, int, int], ...]


_known: OrderedDict[tuple[bytes, int], Layout] = OrderedDict()
_lock = threading.Lock()


def load(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every tensor of ``path``, and where its layout is known all its floating data in as few tensors as possible."""
    whole = _map(path)
    header = _header(whole)
    kind = hashlib.sha256(header).digest(), whole.size
    with _lock:
        layout = _known.get(kind)
        if layout is not None:
            _known.move_to_end(kind)
    if layout is not None:
        return _views(layout, whole)
    tensors = load_safetensors(path)
    layout = _layout(header, whole, tensors) if header else None
    if layout is not None:
        with _lock:
            _known[kind] = layout
            while len(_known) > MOST:
                _known.popitem(last=False)
    return tensors, []


def _map(path: Path) -> Any:
    """The bytes of a file, as an array; none where the file cannot be mapped."""
    try:
        # Not Python's mmap, which keeps the file open for as long as one of its tensors lives.
        return torch.from_file(str(path), shared=False, size=os.stat(path).st_size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError, ValueError):
        return torch.empty(0, dtype=torch.uint8).numpy()


def _header(whole: Any) -> bytes:
    """The header with its length in front; nothing where there is none, or it is too long to keep."""
    length = int.from_bytes(whole[:8].tobytes(), "little")
    if whole.size < 8 or length > min(LONGEST, whole.size - 8) or sys.byteorder != "little":
        return b""
    return whole[: 8 + length].tobytes()


def _views(layout: Layout, whole: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = {
        key: torch.frombuffer(whole, dtype=dtype, count=count, offset=at).view(shape)
        for key, dtype, shape, at, count in layout.tensors
    }
    return tensors, [torch.frombuffer(whole, dtype=d, count=count, offset=at) for d, at, count in layout.runs]


def _layout(header: bytes, whole: Any, tensors: Mapping[str, Tensor]) -> Layout | None:
    """Where the tensors of a file lie; None unless its header, read again, agrees with what the library made of it and
    gives each byte to one tensor, in the order of the offsets."""
    try:
        entries = json.loads(header[8:], object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        if entries.keys() != tensors.keys():
            return None
        places: dict[str, int] = {}
        end = len(header)
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            t, (start, stop) = tensors[key], entry["data_offsets"]
            at = len(header) + start
            if at != end or stop - start != t.nbytes or entry["shape"] != list(t.shape) or not t.numel():
                return None
            if at % t.itemsize:
                return None
            places[key], end = at, at + t.nbytes
        if end != whole.size:
            return None
        found = [(k, t.dtype, t.shape, places[k], t.numel()) for k, t in tensors.items()]
        layout = Layout(tuple(found), _runs([(tensors[k], at) for k, at in places.items()]))
        made = _views(layout, whole)[0]
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError):  # a kind of file that is new
        return None
    same = all(
        (made[k].dtype, made[k].shape, made[k].nbytes) == (t.dtype, t.shape, t.nbytes) for k, t in tensors.items()
    )
    return layout if same else None


def _runs(tensors: list[tuple[Tensor, int]]) -> tuple[tuple[torch.dtype, int, int], ...]:
    """Floating tensors in the order of their bytes, those of one dtype that follow each other as one."""
    runs: list[tuple[torch.dtype, int, int]] = []
    for t, at in tensors:
        if not (t.is_floating_point() or t.is_complex()):
            continue
        dtype, start, count = runs[-1] if runs else (None, 0, 0)
        if dtype is t.dtype and start + count * t.itemsize == at:
            runs[-1] = t.dtype, start, count + t.numel()
        else:
            runs.append((t.dtype, at, t.numel()))
    return tuple(runs)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
