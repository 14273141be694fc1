"""Read the weights and constants of a program: raw bytes, with a table of their dtypes, sizes and strides.

The table has the types of torch's schema (``PayloadConfig``). Tensors own their memory, alias one another where the
table says so, and lie within their records. The bytes are read once, straight into that memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.archives.archive import Archive
from adaptc.archives.refusal import UnsafeFile
from adaptc.safe_pt2.schema import DTYPES, schema

# An expanded weight reads elements several times over. One that needs this many more bytes once it is written out is a
# bomb.
_MAX_EXPANDED_BYTES = 1 << 30
_THREADS = 4
_HUGE_PAGE_THRESHOLD = 4 << 20


def read_tensors(archive: Archive, folder: str, table: schema.PayloadConfig) -> dict[str, Tensor]:
    """Return every tensor of ``table``, whose records lie in ``folder``."""
    shapes = {
        name: _build_named(name, lambda m=meta: _StoredTensor(archive, folder, m))
        for name, meta in table.config.items()
    }
    wanted = {s.record: s.device for s in shapes.values() if s.record is not None}
    with ThreadPoolExecutor(_THREADS) as pool:
        memory = dict(zip(wanted, pool.map(lambda record: _read_record(archive, record), wanted), strict=True))
    moved = {record: memory[record].to(device) for record, device in wanted.items()}
    return {name: _build_named(name, lambda s=s: s.to_tensor(moved)) for name, s in shapes.items()}


def _build_named(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UnsafeFile as error:
        raise error.prepend_location(f"[{name!r}]") from None


def _read_record(archive: Archive, record: str) -> Tensor:
    found = archive.records[record]
    out = _empty_bytes(found.size)
    archive.read_record_into(found, out.numpy().data)
    return out


def _empty_bytes(size: int) -> Tensor:
    """Return ``size`` uninitialised bytes as a uint8 tensor, in huge pages for large sizes where the system has them.

    Most of the time of reading is the first touch of each page. Huge pages save more than the checksums cost.
    """
    if size < _HUGE_PAGE_THRESHOLD or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel may have no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class _StoredTensor:
    """An entry of the table, checked against the length of its record."""

    def __init__(self, archive: Archive, folder: str, meta: schema.PayloadMeta) -> None:
        if meta.use_pickle:
            raise UnsafeFile("its values are a pickle (use_pickle), which can run code; they are not read")
        if meta.tensor_meta is None:
            raise UnsafeFile("it has no dtype, sizes and strides (tensor_meta)")
        self.meta = meta
        found = meta.tensor_meta
        self.dtype = _dtype_of(found)
        self.sizes, self.strides = [_concrete_size(s) for s in found.sizes], [_concrete_size(s) for s in found.strides]
        self.offset = _concrete_size(found.storage_offset)
        if len(self.sizes) != len(self.strides):
            raise UnsafeFile(f"it has {len(self.sizes)} sizes and {len(self.strides)} strides")
        if found.layout != schema.Layout.Strided:
            raise UnsafeFile(f"expected a dense layout, found {schema.Layout(found.layout).name}")
        self.device = _device_of(found.device)
        record = f"{folder}/{meta.path_name}"
        if record not in archive.records:
            raise UnsafeFile(f"there is no record {record!r}")
        self.record = self._check_fits(record, archive.records[record].size)

    def _check_fits(self, record: str, length: int) -> str | None:
        """Return the name of the record, or None where there is nothing to read.

        Raises UnsafeFile where the tensor does not fit."""
        count = 1
        for size in self.sizes:
            count *= size
        if count == 0 or self.device.type == "meta":
            return None
        last = self.offset + sum((n - 1) * step for n, step in zip(self.sizes, self.strides, strict=True))
        width = self.dtype.itemsize
        if (last + 1) * width > length or length % width:
            raise UnsafeFile(
                f"a {self.dtype} of sizes {self.sizes}, strides {self.strides} and offset {self.offset} needs "
                f"{(last + 1) * width} bytes, and record {record!r} has {length}"
            )
        if count * width > length + _MAX_EXPANDED_BYTES:
            raise UnsafeFile(f"sizes {self.sizes} are {count * width} bytes, and record {record!r} has {length}")
        return record

    def to_tensor(self, memory: Mapping[str, Tensor]) -> Tensor:
        if self.record is None:
            out = torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)
        else:
            flat = memory[self.record]
            if self.dtype is torch.bool and bool((flat > 1).any()):
                raise UnsafeFile(f"record {self.record!r} holds bytes that are neither true nor false")
            out = torch.as_strided(flat.view(self.dtype), self.sizes, self.strides, self.offset)
        assert self.meta.tensor_meta is not None
        grad = self.meta.tensor_meta.requires_grad
        if grad and not (out.is_floating_point() or out.is_complex()):
            raise UnsafeFile(f"a {self.dtype} cannot require a gradient")
        return nn.Parameter(out, requires_grad=grad) if self.meta.is_param else out.requires_grad_(grad)


def _dtype_of(meta: schema.TensorMeta) -> torch.dtype:
    found = DTYPES.get(meta.dtype)
    if found is None:
        raise UnsafeFile(f"this torch has no dtype of number {meta.dtype}")
    return found


def _concrete_size(size: Any) -> int:
    """Return a size, stride or offset as an int. Raises UnsafeFile where it is symbolic or negative."""
    if size.type != "as_int" or not 0 <= size.as_int < 2**63:
        raise UnsafeFile(f"expected a size, stride or offset of a tensor, found {size.value}")
    return size.as_int


def _device_of(device: schema.Device) -> torch.device:
    try:
        return torch.device(device.type) if device.index is None else torch.device(device.type, device.index)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsafeFile(f"there is no device {device.type}:{device.index}") from error
