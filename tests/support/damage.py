"""Seeded damage of files: bytes of any, and values of JSON data."""

from __future__ import annotations

import json
import random
from typing import Any

#: cases of one test
BLOCK = 100

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 2**70, 0.5, -1e300, "", "x", "s7", "NaN", "Infinity",
    "../../x", "a\nb", "\ud800", "é", "__import__('os')", [], [[]], {}, {"a": 1}, {"as_int": 1}, [1, 2, 3], "9" * 99,
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file with one of the kinds of damage that disks, transfers and careless tools do."""
    out = bytearray(data)
    at, other = sorted(rng.randrange(len(out)) for _ in range(2))
    kind = rng.randrange(8)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        del out[at : at + rng.randint(1, 40)]
    elif kind == 3:
        out[at:at] = rng.randbytes(rng.randint(1, 40))
    elif kind == 4:
        span = min(len(out) - at, rng.randint(1, 400))
        out[at : at + span] = bytes(span)
    elif kind == 5:
        out[at : at + 64], out[other : other + 64] = out[other : other + 64], out[at : at + 64]
    elif kind == 6:
        # in the directory at the end, where few random places fall
        start = out.rfind(b"PK\1\2", 0, len(out) - rng.randrange(1, 2_000))
        for _ in range(rng.randint(1, 3)):
            out[rng.randrange(max(start, 0), len(out))] = rng.randrange(256)
    else:
        for _ in range(rng.randint(2, 30)):
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def _json_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [p for key, v in inner for p in _json_paths(v, (*path, key))]


def _json_type(value: Any) -> str:
    return type(value).__name__


def mutate_json(data: Any, rng: random.Random) -> tuple[Any, str]:
    """The data with a value of another type, or a field or an item less or more; and where."""
    data = json.loads(json.dumps(data))
    path = rng.choice(_json_paths(data))
    if not path:
        return rng.choice(_VALUES), "all of it"
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    kind = rng.randrange(4)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
    elif kind == 2 and isinstance(holder, dict):
        holder["more"] = rng.choice(_VALUES)
    else:
        holder[last] = rng.choice([v for v in _VALUES if _json_type(v) != _json_type(holder[last])])
    return data, f"{'.'.join(map(str, path))} kind {kind}"
