"""Choose the fastest matmul for a weight on this machine, from a table that is measured once and kept in a file.

:meth:`ProductTable.choice` says for a weight which kind of matmul to ask for, at which classes of rows, and why. A
table is measured when code that needs it is first made, in about a second for each dtype. It is not measured again on
the same processor with the same torch and as many threads. The file lies in the folder ``ADAPTC_CACHE``, or in the
platform's folder for caches. A file that cannot be read, or that holds another table, is measured anew. Where no file
can be written, each process measures for itself. ``ADAPTC_PRODUCTS=plain`` turns all of it off.
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

from adaptc.adapter_files.stable_read import OpenedFile
from adaptc.errors import CheckpointError, ConfigError, shown
from adaptc.locks import free_in_children
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import ALL_CLASSES, LINEAR, ONEDNN, takes
from adaptc.tuning.matmul_times import TURNED, Times, complete, measure, measure_turned

SWITCH, FOLDER = "ADAPTC_PRODUCTS", "ADAPTC_CACHE"

#: the share of ``F.linear``'s time that another matmul must save to be chosen
GAIN = 0.05
#: the share of ``F.linear``'s time by which a matmul may seem slower and still count as equal: noise of the measurement
NOISE = 0.1
#: the fewest rows and columns of a weight that matmuls are chosen for: thinner ones have nothing to gain
THIN = 128
#: the format number of the file
FORMAT = 6
_MOST_BYTES = 1 << 20


def wanted() -> bool:
    """Return whether matmuls are chosen at all. Raises ConfigError where ``ADAPTC_PRODUCTS`` has an unknown value."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "plain"):
        raise ConfigError(f"{SWITCH}={shown(value)} in the environment has no meaning: set it to plain, or not at all")
    return not value


def folder() -> Path:
    """Return the folder that tables are kept in. Raises RuntimeError where the user has no home directory."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adaptc"
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(name) or Path.home() / ".cache") / "adaptc"


def identity(dtype: torch.dtype, of: str = "") -> dict[str, Any]:
    """Return what times depend on, as the file says it. ``of``: as for :func:`product_table`."""
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        **({"of": of} if of else {}),
    }


#: the fields of ``/proc/cpuinfo`` that tell processors apart: on virtual machines several generations share one name
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
    """A table of measured times, and the choices that follow from them.

    ``times`` maps (rows of the weight, columns of the weight, class of rows of the input) to seconds. The seconds are
    those of linear, of oneDNN and, at few rows, of columns. Where ``times`` is empty, every choice is linear.
    """

    times: Times

    def choice(self, out: int, width: int) -> MatmulChoice:
        """Return the choice for a weight (out, width): for each class of rows, that of the nearest measured size."""
        if min(out, width) < THIN:
            return MatmulChoice(LINEAR, (), f"fewer than {THIN} rows or columns")
        ratios = self._ratios(out, width)
        if not ratios:
            return MatmulChoice(LINEAR, (), "nothing else was measured here")
        turned = self._ratios(out, width, 2)
        columns = tuple(c for c, r in turned.items() if r <= (1 - GAIN) * min(1, ratios[c]))
        classes = tuple(c for c, r in ratios.items() if r <= 1 - GAIN and c not in columns)
        if not classes and not columns:
            return MatmulChoice(LINEAR, (), "measured: the fastest here")
        at, turned_at = tuple(ratios[c] for c in classes), tuple(turned[c] for c in columns)
        return MatmulChoice(ONEDNN, classes, "measured: faster here", at, columns, turned_at)

    def choice_for_all(self, out: int, width: int) -> MatmulChoice:
        """Return the choice for a weight (out, width) in code that uses one kind of matmul at all numbers of rows.

        A kind other than linear is chosen where it is faster at some classes of rows and slower at none.
        """
        found = self.choice(out, width)
        if found.kind == LINEAR:
            return found
        if not found.classes:
            return MatmulChoice(LINEAR, (), "measured: the fastest here but at a few rows")
        ratios = self._ratios(out, width)
        if max(ratios.values()) > 1 + NOISE:
            return MatmulChoice(LINEAR, (), "measured: what is faster at some rows is slower at others")
        return MatmulChoice(found.kind, ALL_CLASSES, "measured: faster here, at no rows slower", tuple(ratios.values()))

    def spared(self, out: int, width: int) -> float:
        """Return how many seconds columns saves over the other kinds in a call, at the class of rows with most gain."""
        found = [self._nearest(out, width, c) for c in self.choice(out, width).columns]
        return max((out * width / (s[0] * s[1]) * (min(t[:2]) - t[2]) for s, t in filter(None, found)), default=0.0)

    def _ratios(self, out: int, width: int, kind: int = 1) -> dict[int, float]:
        """Return class of rows -> the time of a kind over that of linear, at the classes it was measured at.

        ``kind``: 1 for oneDNN, 2 for columns.
        """
        return {c: r for c in ALL_CLASSES if (r := self._ratio(out, width, c, kind)) is not None}

    def _ratio(self, out: int, width: int, rows: int, kind: int) -> float | None:
        found = self._nearest(out, width, rows, kind)
        return None if found is None else found[1][kind] / found[1][0]

    def _nearest(
        self, out: int, width: int, rows: int, kind: int = 2
    ) -> tuple[tuple[int, int, int], tuple[float, ...]] | None:
        """Return the nearest (rows, columns, class) at which ``kind`` was measured, and its times; None without one."""

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
    """Return the table for matmuls of ``dtype``: the one this process has, one read from a file, or one measured now.

    ``of`` names what ``measuring`` measures; '' stands for the kinds of matmul on weights as they lie.
    """
    if not takes(dtype):
        return ProductTable({})
    what = identity(dtype, of)
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    try:
        path = folder() / f"products-{name}.json"
    except RuntimeError:  # the user has no home directory, as in some containers
        path = None
    with _lock:
        key = f"{path}:{name}"
        if key not in _known:
            times = None if path is None else read(path, what)
            if times is None:
                times = measuring(dtype)
                if complete(times, of) and path is not None:  # a busy machine may run out of the budget of time
                    write(path, what, times)
            _known[key] = ProductTable(times)
        return _known[key]


def choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul to use for a weight (out, width), for each class of rows."""
    return _table_for(out, width, dtype).choice(out, width)


def spared(out: int, width: int, dtype: torch.dtype) -> float:
    """Return the seconds that the columns matmul saves in a call, for a weight (out, width)."""
    return _table_for(out, width, dtype).spared(out, width)


def choose_for_all(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the one matmul to use for a weight (out, width) at any number of rows."""
    return _table_for(out, width, dtype).choice_for_all(out, width)


def _table_for(out: int, width: int, dtype: torch.dtype) -> ProductTable:
    """Return the table for a weight (out, width): an empty one where it is too thin, so that nothing is measured."""
    return ProductTable({}) if min(out, width) < THIN else product_table(dtype)


def choose_for_gradient(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul to use for the input gradient of a layer whose weight is (out, width)."""
    thin = min(out, width) < THIN
    return (ProductTable({}) if thin else product_table(dtype, measure_turned, TURNED)).choice(width, out)


def read(path: Path, what: Mapping[str, Any]) -> Times | None:
    """Return the times in a file, or None where it is no complete table of ``what``."""
    try:
        with OpenedFile(path) as file:  # refuses anything but a plain file: reading a pipe would wait for ever
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
    """Write the times to ``path`` as a whole; where that fails, leave what is there and raise nothing."""
    data = {**what, "times": [[*size, *kinds] for size, kinds in times.items()]}
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(data))
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
