"""Which product is faster on this machine: a table that is measured once, and kept as a file.

Before: nothing, a file, or a damaged one. After: :meth:`ProductTable.choice` says for a weight which kind of product to
ask for, at which classes of rows, and why. It is measured when code for calls is first made that has a use for it, in
a second for each type of numbers, and never again on this processor with this torch and as many threads.
It lies in the folder ``ADAPTC_CACHE``, or the platform's own for caches. A file that cannot be read, or is of something
else, is measured anew; where none can be written, each process measures for itself. ``ADAPTC_PRODUCTS=plain`` turns all
of it off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import CheckpointError, ConfigError, shown
from adaptc.locks import free_in_children
from adaptc.passes.ir.product import ALL_CLASSES, LINEAR, ONEDNN, takes
from adaptc.passes.lower.choose_products import Choice
from adaptc.peft_files.snapshot import Opened
from adaptc.runtime.product_times import TURNED, Times, complete, measure, measure_turned

SWITCH, FOLDER = "ADAPTC_PRODUCTS", "ADAPTC_CACHE"

#: how much less time a product must take to be worth another one than linear's
GAIN = 0.05
#: how much more time at some rows is taken for noise of the measurement, where it is less at others
NOISE = 0.1
#: the least rows and columns of a weight: thinner products have nothing to gain
THIN = 128
#: of the file
FORMAT = 6
_MOST_BYTES = 1 << 20


def wanted() -> bool:
    """Whether products are chosen at all. Raises ConfigError for a setting without a meaning."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "plain"):
        raise ConfigError(f"{SWITCH}={shown(value)} in the environment has no meaning: set it to plain, or not at all")
    return not value


def folder() -> Path:
    """Where tables are kept."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adaptc"
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(name) or Path.home() / ".cache") / "adaptc"


def identity(dtype: torch.dtype, of: str = "") -> dict[str, Any]:
    """What times depend on, as the file says it."""
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        **({"of": of} if of else {}),
    }


#: of Linux's description of the first processor; virtual machines give several generations one name
_DESCRIBES = ("model name", "cpu family", "model", "cache size", "CPU implementer", "CPU part")


def _processor() -> str:
    found: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            name, _, value = line.partition(":")
            if name.strip() in _DESCRIBES:
                found.setdefault(name.strip(), value.strip())
    return ", ".join(found.values()) or platform.processor() or platform.machine()


@dataclass(frozen=True)
class ProductTable:
    """``times``: (rows, columns of the weight, class) -> seconds of linear, of oneDNN and, at a few rows, of columns;
    empty: nothing is faster."""

    times: Times

    def choice(self, out: int, width: int) -> Choice:
        """For a weight of (out, width): read off the nearest that was measured, for each class of rows."""
        if min(out, width) < THIN:
            return Choice(LINEAR, (), f"fewer than {THIN} rows or columns")
        ratios = self._ratios(out, width)
        if not ratios:
            return Choice(LINEAR, (), "nothing else was measured here")
        turned = self._ratios(out, width, 2)
        columns = tuple(c for c, r in turned.items() if r <= (1 - GAIN) * min(1, ratios[c]))
        classes = tuple(c for c, r in ratios.items() if r <= 1 - GAIN and c not in columns)
        if not classes and not columns:
            return Choice(LINEAR, (), "measured: the fastest here")
        at, turned_at = tuple(ratios[c] for c in classes), tuple(turned[c] for c in columns)
        return Choice(ONEDNN, classes, "measured: faster here", at, columns, turned_at)

    def choice_for_all(self, out: int, width: int) -> Choice:
        """The same, of code that computes calls of any number of rows by one kind: another than linear where it is
        faster at some and slower at none."""
        found = self.choice(out, width)
        if found.kind == LINEAR:
            return found
        if not found.classes:
            return Choice(LINEAR, (), "measured: the fastest here but at a few rows")
        ratios = self._ratios(out, width)
        if max(ratios.values()) > 1 + NOISE:
            return Choice(LINEAR, (), "measured: what is faster at some rows is slower at others")
        return Choice(found.kind, ALL_CLASSES, "measured: faster here, at no rows slower", tuple(ratios.values()))

    def spared(self, out: int, width: int) -> float:
        """How many seconds the product of columns saves over the others in a call, at the rows where that is most."""
        found = [self._nearest(out, width, c) for c in self.choice(out, width).columns]
        return max((out * width / (s[0] * s[1]) * (min(t[:2]) - t[2]) for s, t in filter(None, found)), default=0.0)

    def _ratios(self, out: int, width: int, kind: int = 1) -> dict[int, float]:
        """The time of a kind, oneDNN or columns, over that of linear at each class at which it was measured."""
        return {c: r for c in ALL_CLASSES if (r := self._ratio(out, width, c, kind)) is not None}

    def _ratio(self, out: int, width: int, rows: int, kind: int) -> float | None:
        found = self._nearest(out, width, rows, kind)
        return None if found is None else found[1][kind] / found[1][0]

    def _nearest(
        self, out: int, width: int, rows: int, kind: int = 2
    ) -> tuple[tuple[int, int, int], tuple[float, ...]] | None:
        """The size nearest to this one at which a kind was measured, and its times."""

        def far(size: tuple[int, int, int]) -> float:
            return abs(math.log(out / size[0])) + abs(math.log(width / size[1]))

        found = [s for s, times in self.times.items() if s[2] == rows and len(times) > kind]
        if not found:
            return None
        size = min(found, key=far)
        return size, self.times[size]


_lock = free_in_children(threading.Lock())
_known: dict[str, ProductTable] = {}


def product_table(
    dtype: torch.dtype, measuring: Callable[[torch.dtype], Times] = measure, of: str = ""
) -> ProductTable:
    """The table for products of ``dtype``: what this process knows, what a file says, or measured now. ``of``: what
    ``measuring`` measures, where that is not linear and oneDNN on weights as they lie."""
    if not takes(dtype):
        return ProductTable({})
    what = identity(dtype, of)
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    try:
        path = folder() / f"products-{name}.json"
    except RuntimeError:  # nobody's home
        path = None
    with _lock:
        key = f"{path}:{name}"
        if key not in _known:
            times = None if path is None else read(path, what)
            if times is None:
                times = measuring(dtype)
                if complete(times, of) and path is not None:  # on a busy machine it may not be
                    write(path, what, times)
            _known[key] = ProductTable(times)
        return _known[key]


def choose(out: int, width: int, dtype: torch.dtype) -> Choice:
    """The product for a weight of (out, width), for each class of rows."""
    return _table_for(out, width, dtype).choice(out, width)


def spared(out: int, width: int, dtype: torch.dtype) -> float:
    """The seconds that the product of columns saves in a call, for a weight of (out, width)."""
    return _table_for(out, width, dtype).spared(out, width)


def choose_for_all(out: int, width: int, dtype: torch.dtype) -> Choice:
    """The product for a weight of (out, width), for any number of rows."""
    return _table_for(out, width, dtype).choice_for_all(out, width)


def _table_for(out: int, width: int, dtype: torch.dtype) -> ProductTable:
    """What needs no times asks for none."""
    return ProductTable({}) if min(out, width) < THIN else product_table(dtype)


def choose_for_gradient(out: int, width: int, dtype: torch.dtype) -> Choice:
    """The product for the gradient of inputs of a layer whose weight is (out, width)."""
    thin = min(out, width) < THIN
    return (ProductTable({}) if thin else product_table(dtype, measure_turned, TURNED)).choice(width, out)


def read(path: Path, what: Mapping[str, Any]) -> Times | None:
    """The times in a file, or None where it is no table of ``what``."""
    try:
        with Opened(path) as file:  # which refuses what is no plain file: a pipe would be waited for
            if file.size > _MOST_BYTES:
                return None
            data = json.loads(file.bytes())
        if {k: data[k] for k in what} != dict(what):
            return None
        times: Times = {}
        for out, width, rows, *kinds in data["times"]:
            if not 2 <= len(kinds) <= 3:
                return None
            seconds = tuple(map(float, kinds))
            if not all(0 < s < math.inf for s in seconds):
                return None
            times[out, width, rows] = seconds
        return times if complete(times, what.get("of", "")) else None
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def write(path: Path, what: Mapping[str, Any], times: Times) -> None:
    """Keep the times, all or nothing; where that is not possible, do nothing."""
    data = {**what, "times": [[*size, *kinds] for size, kinds in times.items()]}
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(data))
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
