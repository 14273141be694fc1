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

from adaptc.adapter_files.safe_load import load_safetensors
from adaptc.adapter_files.stable_read import MAX_JSON_BYTES, OpenedFile
from adaptc.errors import CheckpointError
from adaptc.locks import reset_after_fork
from adaptc.torch_typing import is_dict

#: the number of layouts kept; the least recently used is dropped first
MAX_LAYOUTS = 32
#: the bytes of the longest header whose layout is kept, some ten thousand tensors
MAX_HEADER_BYTES = 1 << 20
#: the alignment in bytes of the data in memory, a cache line
_ALIGNMENT = 64
#: the library's error for a correct header without data
_NO_DATA_ERROR = "incomplete metadata, file not fully covered"
#: names of dtypes in headers
DTYPES = {
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

    ``tensors`` has for each tensor (key, dtype, shape, first byte of the data, elements). ``flat_ranges`` has (dtype,
    first byte, elements) of consecutive floating data.
    """

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    flat_ranges: tuple[tuple[torch.dtype, int, int], ...]


_layouts: OrderedDict[tuple[bytes, int], FileLayout] = OrderedDict()
_lock = reset_after_fork(threading.Lock())


def load_tensors(file: OpenedFile) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return every tensor of ``file``, and all its floating data in as few tensors as possible where its layout is
    known.

    Raises CheckpointError for a damaged file.
    """
    file_bytes = _read_aligned(file)
    header = _header_bytes(file_bytes)
    if not header:
        return load_safetensors(file.path, file_bytes), []
    layout_key = hashlib.sha256(header).digest(), file_bytes.size
    with _lock:
        layout = _layouts.get(layout_key)
        if layout is not None:
            _layouts.move_to_end(layout_key)
    if layout is None:
        layout = _parse_layout(header, file_bytes.size)
        if layout is None:
            return load_safetensors(file.path, file_bytes), []
        with _lock:
            _layouts[layout_key] = layout
            while len(_layouts) > MAX_LAYOUTS:
                _layouts.popitem(last=False)
    return _tensor_views(layout, file_bytes[len(header) :])


def read_metadata(file: OpenedFile) -> dict[str, str]:
    """Return the texts of the header's ``__metadata__``, of a file that :func:`load_tensors` has read."""
    first = bytearray(8)
    file.read_into(first)
    length = min(int.from_bytes(first, "little"), file.size - 8)
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{file.path} has a header of {length} bytes; that of an adapter is never that large.")
    start = bytearray(8 + length)
    file.read_into(start)
    try:
        texts = json.loads(start[8:], object_pairs_hook=_refuse_duplicates).get("__metadata__", {})
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file.path} has a header that cannot be read ({exc}). Download it again.") from exc
    return {k: v for k, v in texts.items() if isinstance(v, str)} if is_dict(texts) else {}


def _read_aligned(file: OpenedFile) -> Any:
    """Return the bytes of a file as a uint8 array, in which the data after the header is aligned."""
    first = bytearray(8)
    if file.size >= 8:
        file.read_into(first)
    length = int.from_bytes(first, "little")
    try:
        # Not torch.empty: it aligns, so its memory is mostly new to the process, and the page faults take longer than
        # the reading.
        room = np.empty(_ALIGNMENT + file.size, np.uint8)
    except (ValueError, MemoryError) as exc:
        raise CheckpointError(f"{file.path} has {file.size} bytes, for which there is no memory here") from exc
    lead = -(room.ctypes.data + 8 + length) % _ALIGNMENT
    whole = room[lead : lead + file.size]
    file.read_into(whole)
    return whole


def _header_bytes(file_bytes: Any) -> bytes:
    """Return the header with its 8-byte length, or b"" where there is none, or its layout is not kept."""
    length = int.from_bytes(file_bytes[:8].tobytes(), "little")
    if file_bytes.size < 8 or length > min(MAX_HEADER_BYTES, file_bytes.size - 8) or sys.byteorder != "little":
        return b""
    return file_bytes[: 8 + length].tobytes()


def _tensor_views(layout: FileLayout, data: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = {
        key: torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)
        for key, dtype, shape, at, count in layout.tensors
    }
    return tensors, [torch.frombuffer(data, dtype=d, count=count, offset=at) for d, at, count in layout.flat_ranges]


def _parse_layout(header: bytes, size: int) -> FileLayout | None:
    """Return the layout of a file of ``size`` bytes with this header, or None where the library must read it.

    The library must find no fault in the header. Each byte must belong to one tensor, aligned and in the order of
    offsets.
    """
    try:
        deserialize(header)
        return None  # the header is complete without data, so there is none
    except SafetensorError as exc:
        if _NO_DATA_ERROR not in str(exc):
            return None
    try:
        entries = json.loads(header[8:], object_pairs_hook=_refuse_duplicates)
        entries.pop("__metadata__", None)
        entries_by_key: dict[str, tuple[str, torch.dtype, tuple[int, ...], int, int]] = {}
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            count = prod(shape)
            if start != end or stop - start != count * dtype.itemsize or not count or start % dtype.itemsize:
                return None
            entries_by_key[key], end = (key, dtype, shape, start, count), stop
        if len(header) + end != size:
            return None
    except (KeyError, TypeError, ValueError, RecursionError):  # an unknown dtype, or a header of another form
        return None
    return FileLayout(tuple(entries_by_key[key] for key in entries), _join_ranges(list(entries_by_key.values())))


def _join_ranges(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...], int, int]],
) -> tuple[tuple[torch.dtype, int, int], ...]:
    """Return the floating tensors in the order of their bytes, with neighbours of one dtype joined to one run."""
    ranges: list[tuple[torch.dtype, int, int]] = []
    for _, own, _, at, elements in tensors:
        if not (own.is_floating_point or own.is_complex):
            continue
        dtype, start, count = ranges[-1] if ranges else (None, 0, 0)
        if dtype is own and start + count * own.itemsize == at:
            ranges[-1] = own, start, count + elements
        else:
            ranges.append((own, at, elements))
    return tuple(ranges)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError where it has a name twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
