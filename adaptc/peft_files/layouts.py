"""safetensors files as tensors, by layouts that are known: where in the file each tensor lies.

Before: a file that is open. After: one buffer of our own, filled in one pass over the file, and tensors that are views
of it, so that nothing that becomes of the file reaches them; or a CheckpointError.

The library maps files, or copies what it is given twice over, so it is left to judge headers alone: it is given the
header without the data, and must have nothing to say but that the data is missing. What became of a header is
remembered under a digest of its bytes and the size of the file, on which alone the answer rests; the next file with
that header is not parsed. Adapters of one structure that were written by one program have one header. What lies in a
file in another way than it does in most is left to the library with all its data.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from adaptc.errors import CheckpointError
from adaptc.locks import free_in_children
from adaptc.peft_files.safe_io import MAX_JSON, load_safetensors
from adaptc.peft_files.snapshot import Opened

#: layouts kept; the one not used for longest goes first
MOST = 32
#: longest header whose layout is kept, some ten thousand tensors
LONGEST = 1 << 20
#: where the data begins in memory is a multiple of this, a cache line
_ALIGNED = 64
#: what the library says of a header that is right when there is no data behind it
_NO_DATA = "incomplete metadata, file not fully covered"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Layout:
    """``tensors``: (key, dtype, shape, first byte of the data, elements); ``runs``: (dtype, first byte, elements) of
    all floating data."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    runs: tuple[tuple[torch.dtype, int, int], ...]


_known: OrderedDict[tuple[bytes, int], Layout] = OrderedDict()
_lock = free_in_children(threading.Lock())


def load(file: Opened) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every tensor of ``file``, and where its layout is known all its floating data in as few tensors as possible."""
    whole = _read(file)
    header = _header(whole)
    if not header:
        return load_safetensors(file.path, whole), []
    kind = hashlib.sha256(header).digest(), whole.size
    with _lock:
        layout = _known.get(kind)
        if layout is not None:
            _known.move_to_end(kind)
    if layout is None:
        layout = _layout(header, whole.size)
        if layout is None:
            return load_safetensors(file.path, whole), []
        with _lock:
            _known[kind] = layout
            while len(_known) > MOST:
                _known.popitem(last=False)
    return _views(layout, whole[len(header) :])


def header_texts(file: Opened) -> dict[str, str]:
    """What the header of a file that :func:`load` has read says beside its tensors."""
    first = bytearray(8)
    file.into(first)
    length = min(int.from_bytes(first, "little"), file.size - 8)
    if length > MAX_JSON:
        raise CheckpointError(f"{file.path} has a header of {length} bytes; that of an adapter is never that large.")
    start = bytearray(8 + length)
    file.into(start)
    try:
        texts = json.loads(start[8:], object_pairs_hook=_once).get("__metadata__", {})
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file.path} has a header that cannot be read ({exc}). Download it again.") from exc
    return {k: v for k, v in texts.items() if isinstance(v, str)} if isinstance(texts, dict) else {}


def _read(file: Opened) -> Any:
    """The bytes of a file, as an array whose part behind the header is aligned."""
    first = bytearray(8)
    if file.size >= 8:
        file.into(first)
    length = int.from_bytes(first, "little")
    try:
        # Not torch.empty: its memory is aligned, and so mostly new to the process, which takes longer than the reading.
        room = np.empty(_ALIGNED + file.size, np.uint8)
    except (ValueError, MemoryError) as exc:
        raise CheckpointError(f"{file.path} has {file.size} bytes, for which there is no memory here") from exc
    lead = -(room.ctypes.data + 8 + length) % _ALIGNED
    whole = room[lead : lead + file.size]
    file.into(whole)
    return whole


def _header(whole: Any) -> bytes:
    """The header with its length in front; nothing where there is none, or it is too long to keep."""
    length = int.from_bytes(whole[:8].tobytes(), "little")
    if whole.size < 8 or length > min(LONGEST, whole.size - 8) or sys.byteorder != "little":
        return b""
    return whole[: 8 + length].tobytes()


def _views(layout: Layout, data: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = {
        key: torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)
        for key, dtype, shape, at, count in layout.tensors
    }
    return tensors, [torch.frombuffer(data, dtype=d, count=count, offset=at) for d, at, count in layout.runs]


def _layout(header: bytes, size: int) -> Layout | None:
    """Where the tensors of a file lie; None unless the library has nothing against its header, and the header gives
    each byte to one tensor, aligned and in the order of the offsets."""
    try:
        deserialize(header)
        return None  # there is no data at all
    except SafetensorError as exc:
        if _NO_DATA not in str(exc):
            return None
    try:
        entries = json.loads(header[8:], object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        found: dict[str, tuple[str, torch.dtype, tuple[int, ...], int, int]] = {}
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            count = prod(shape)
            if start != end or stop - start != count * dtype.itemsize or not count or start % dtype.itemsize:
                return None
            found[key], end = (key, dtype, shape, start, count), stop
        if len(header) + end != size:
            return None
    except (KeyError, TypeError, ValueError, RecursionError):  # a kind of file that is new
        return None
    return Layout(tuple(found[key] for key in entries), _runs(list(found.values())))


def _runs(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...], int, int]],
) -> tuple[tuple[torch.dtype, int, int], ...]:
    """Floating tensors in the order of their bytes, those of one dtype that follow each other as one."""
    runs: list[tuple[torch.dtype, int, int]] = []
    for _, own, _, at, elements in tensors:
        if not (own.is_floating_point or own.is_complex):
            continue
        dtype, start, count = runs[-1] if runs else (None, 0, 0)
        if dtype is own and start + count * own.itemsize == at:
            runs[-1] = own, start, count + elements
        else:
            runs.append((own, at, elements))
    return tuple(runs)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
