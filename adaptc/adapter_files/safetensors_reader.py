"""Read safetensors files by known layouts, which say where in the file each tensor lies.

An open file is read in one pass into one buffer of adaptc's own. The tensors are views of that buffer, so later changes
to the file do not reach them. A damaged file raises CheckpointError.

The safetensors library maps files, or copies its input twice, so here it only judges headers. It is given the header
without the data, and must find no fault but the missing data. The layout is kept under a digest of the header's bytes
and the size of the file, which decide it fully. The next file with that header is not parsed. Adapters of one
structure, written by one program, have one header. A file with an unusual layout is left to the library, with all its
data.
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

from adaptc.adapter_files.safe_load import MAX_JSON, load_safetensors
from adaptc.adapter_files.stable_read import OpenedFile
from adaptc.errors import CheckpointError
from adaptc.locks import free_in_children

#: the number of layouts kept; the least recently used is dropped first
MOST = 32
#: the bytes of the longest header whose layout is kept, some ten thousand tensors
LONGEST = 1 << 20
#: the alignment in bytes of the data in memory, a cache line
_ALIGNED = 64
#: the library's error for a correct header without data
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
class FileLayout:
    """The places of a file's tensors.

    ``tensors`` has for each tensor (key, dtype, shape, first byte of the data, elements). ``runs`` has (dtype, first
    byte, elements) of consecutive floating data.
    """

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    runs: tuple[tuple[torch.dtype, int, int], ...]


_known: OrderedDict[tuple[bytes, int], FileLayout] = OrderedDict()
_lock = free_in_children(threading.Lock())


def load(file: OpenedFile) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return every tensor of ``file``, and all its floating data in as few tensors as possible where its layout is
    known.

    Raises CheckpointError for a damaged file.
    """
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


def header_texts(file: OpenedFile) -> dict[str, str]:
    """Return the texts of the header's ``__metadata__``, of a file that :func:`load` has read."""
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


def _read(file: OpenedFile) -> Any:
    """Return the bytes of a file as a uint8 array, in which the data after the header is aligned."""
    first = bytearray(8)
    if file.size >= 8:
        file.into(first)
    length = int.from_bytes(first, "little")
    try:
        # Not torch.empty: it aligns, so its memory is mostly new to the process, and the page faults take longer than
        # the reading.
        room = np.empty(_ALIGNED + file.size, np.uint8)
    except (ValueError, MemoryError) as exc:
        raise CheckpointError(f"{file.path} has {file.size} bytes, for which there is no memory here") from exc
    lead = -(room.ctypes.data + 8 + length) % _ALIGNED
    whole = room[lead : lead + file.size]
    file.into(whole)
    return whole


def _header(whole: Any) -> bytes:
    """Return the header with its 8-byte length, or b"" where there is none, or its layout is not kept."""
    length = int.from_bytes(whole[:8].tobytes(), "little")
    if whole.size < 8 or length > min(LONGEST, whole.size - 8) or sys.byteorder != "little":
        return b""
    return whole[: 8 + length].tobytes()


def _views(layout: FileLayout, data: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = {
        key: torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)
        for key, dtype, shape, at, count in layout.tensors
    }
    return tensors, [torch.frombuffer(data, dtype=d, count=count, offset=at) for d, at, count in layout.runs]


def _layout(header: bytes, size: int) -> FileLayout | None:
    """Return the layout of a file of ``size`` bytes with this header, or None where the library must read it.

    The library must find no fault in the header. Each byte must belong to one tensor, aligned and in the order of
    offsets.
    """
    try:
        deserialize(header)
        return None  # the header is complete without data, so there is none
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
    except (KeyError, TypeError, ValueError, RecursionError):  # an unknown dtype, or a header of another form
        return None
    return FileLayout(tuple(found[key] for key in entries), _runs(list(found.values())))


def _runs(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...], int, int]],
) -> tuple[tuple[torch.dtype, int, int], ...]:
    """Return the floating tensors in the order of their bytes, with neighbours of one dtype joined to one run."""
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
    """Return a JSON object as a dict. Raises ValueError where it has a name twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
