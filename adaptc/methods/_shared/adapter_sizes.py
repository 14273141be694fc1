"""Refuse adapters that do not fit into memory, by the shapes of their slots, before any tensor is made.

A rank may be larger than the layer, so no size is wrong in itself. Refused are adapters larger than the memory, and
shapes that no tensor can have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import ConfigError, short_repr
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.parts.method_part import SiteDescription, Slot

#: bytes of memory that are assumed to be free always
ALWAYS_FREE_BYTES = 2**28
#: bytes of memory that are assumed where the system does not say how much there is
_UNKNOWN_MEMORY_BYTES = 2**43


def check_sizes(config: Any, sites: Iterable[tuple[SiteDescription, Method, Op]]) -> None:
    """Raise ConfigError where the slots of ``sites`` are larger than memory, naming the option and the slot.

    Sizes are counted in float32, in which first values are drawn. A shared slot counts once.
    """
    total_bytes, limit_bytes, seen_shared = 0, ALWAYS_FREE_BYTES, set()
    known: dict[tuple[Method, Op], Mapping[str, Slot]] = {}  # most layers of a model are alike
    for place, method, op in sites:
        slots = known.get((method, op)) or known.setdefault((method, op), method.slots(op))
        for name, slot in slots.items():
            if any(n < 0 for n in slot.shape):
                raise ConfigError(
                    f"{_describe_options(config, op)}: {name!r} of {place.key!r} would have shape {slot.shape}"
                )
            if (slot.shared or slot.key) and (slot.key or name, slot.shape) in seen_shared:
                continue
            seen_shared.add((slot.key or name, slot.shape))
            total_bytes += _slot_bytes(slot)
            if total_bytes > limit_bytes == ALWAYS_FREE_BYTES:
                limit_bytes = max(ALWAYS_FREE_BYTES, _available_bytes())
            if total_bytes > limit_bytes:
                raise ConfigError(
                    f"{_describe_options(config, op)}: {name!r} of the layer {place.key!r}, whose weight is "
                    f"{tuple(op.shape)}, would have shape {slot.shape}, and the adapter takes "
                    f"{total_bytes / 2**30:,.0f} GiB up to it; there are {limit_bytes / 2**30:,.0f} GiB of memory "
                    "here. Choose smaller sizes, or adapt fewer layers."
                )


def _slot_bytes(slot: Slot) -> int:
    return prod(slot.shape) * max(4, 1 if slot.dtype is None else slot.dtype.itemsize)


def _describe_options(config: Any, op: Op) -> str:
    """Return the config's name with the sizes that are probably to blame, for a message.

    They are the integers that are larger than the layer and not tiny beside the largest one; without any, all of them.
    """
    found: dict[str, int] = {}
    for name, value in vars(config).items():
        entries = value if isinstance(value, Mapping) else {"": value}
        for key, v in entries.items():
            if isinstance(v, int) and not isinstance(v, bool) and v > 1:
                found[f"{name}[{key!r}]" if key else name] = v
    least = max(max(op.shape, default=0), max(found.values(), default=0) // 1000)
    large = {n: v for n, v in found.items() if v > least} or found
    listed = ", ".join(f"{n}={short_repr(v)}" for n, v in list(large.items())[:8])
    return f"{type(config).__name__} with {listed}" if listed else type(config).__name__


def _available_bytes() -> int:
    """Return the bytes of free main memory, at most the limit of this process's control group, plus all GPU memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return _UNKNOWN_MEMORY_BYTES
    with contextlib.suppress(OSError, ValueError):  # "max", or no such group
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if torch.cuda.is_available():
        found += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return found
