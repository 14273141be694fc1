"""Choose the fastest matmul for a weight on this machine, from a table that is measured once and kept in a file.

:meth:`MatmulTable.choose_by_class` says for a weight which kind of matmul to ask for, at which classes of rows, and
why. A table is measured when code that needs it is first made, in about a second for each dtype. It is not measured
again on the same processor with the same torch and as many threads. The file lies in the folder ``ADAPTC_CACHE``, or in
the platform's folder for caches. A file that cannot be read, or that holds another table, is measured anew. Where no
file can be written, each process measures for itself. ``ADAPTC_PRODUCTS=plain`` turns all of it off.
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
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.locks import reset_after_fork
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN, onednn_supports
from adaptc.tuning.matmul_times import TRANSPOSED, Times, is_complete, measure_times, measure_transposed

SWITCH_VARIABLE, FOLDER_VARIABLE = "ADAPTC_PRODUCTS", "ADAPTC_CACHE"

#: the share of ``F.linear``'s time that another matmul must save to be chosen
MIN_GAIN = 0.05
#: the share of ``F.linear``'s time by which a matmul may seem slower and still count as equal: noise of the measurement
NOISE = 0.1
#: the fewest rows and columns of a weight that matmuls are chosen for: thinner ones have nothing to gain
MIN_SIZE = 128
#: the format number of the file
FORMAT = 6
_MAX_FILE_BYTES = 1 << 20


def chooses_matmuls() -> bool:
    """Return whether matmuls are chosen at all. Raises ConfigError where ``ADAPTC_PRODUCTS`` has an unknown value."""
    value = os.environ.get(SWITCH_VARIABLE, "")
    if value not in ("", "plain"):
        raise ConfigError(
            f"{SWITCH_VARIABLE}={short_repr(value)} in the environment has no meaning: set it to plain, or not at all"
        )
    return not value


def cache_folder() -> Path:
    """Return the folder that tables are kept in. Raises RuntimeError where the user has no home directory."""
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adaptc"
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(name) or Path.home() / ".cache") / "adaptc"


def table_identity(dtype: torch.dtype, table_name: str = "") -> dict[str, Any]:
    """Return what times depend on, as the file says it. ``of``: as for :func:`matmul_table`."""
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "processor": _processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        **({"of": table_name} if table_name else {}),
    }


#: the fields of ``/proc/cpuinfo`` that tell processors apart: on virtual machines several generations share one name
_CPU_FIELDS = ("model name", "cpu family", "model", "cache size", "CPU implementer", "CPU part")


def _processor_name() -> str:
    found: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            name, _, value = line.partition(":")
            if name.strip() in _CPU_FIELDS:
                found.setdefault(name.strip(), value.strip())
    return ", ".join(found.values()) or platform.processor() or platform.machine()


@dataclass(frozen=True)
class MatmulTable:
    """A table of measured times, and the choices that follow from them.

    ``times`` maps (rows of the weight, columns of the weight, class of rows of the input) to seconds. The seconds are
    those of linear, of oneDNN and, at few rows, of columns. Where ``times`` is empty, every choice is linear.
    """

    times: Times

    def choose_by_class(self, out: int, width: int) -> MatmulChoice:
        """Return the choice for a weight (out, width): for each class of rows, that of the nearest measured size."""
        if min(out, width) < MIN_SIZE:
            return MatmulChoice(LINEAR, (), f"fewer than {MIN_SIZE} rows or columns")
        ratios = self._time_ratios(out, width)
        if not ratios:
            return MatmulChoice(LINEAR, (), "nothing else was measured here")
        turned = self._time_ratios(out, width, 2)
        columns = tuple(c for c, r in turned.items() if r <= (1 - MIN_GAIN) * min(1, ratios[c]))
        classes = tuple(c for c, r in ratios.items() if r <= 1 - MIN_GAIN and c not in columns)
        if not classes and not columns:
            return MatmulChoice(LINEAR, (), "measured: the fastest here")
        at, turned_at = tuple(ratios[c] for c in classes), tuple(turned[c] for c in columns)
        return MatmulChoice(ONEDNN, classes, "measured: faster here", at, columns, turned_at)

    def choose_for_all_rows(self, out: int, width: int) -> MatmulChoice:
        """Return the choice for a weight (out, width) in code that uses one kind of matmul at all numbers of rows.

        A kind other than linear is chosen where it is faster at some classes of rows and slower at none.
        """
        found = self.choose_by_class(out, width)
        if found.kind == LINEAR:
            return found
        if not found.classes:
            return MatmulChoice(LINEAR, (), "measured: the fastest here but at a few rows")
        ratios = self._time_ratios(out, width)
        if max(ratios.values()) > 1 + NOISE:
            return MatmulChoice(LINEAR, (), "measured: what is faster at some rows is slower at others")
        return MatmulChoice(
            found.kind, ALL_ROW_CLASSES, "measured: faster here, at no rows slower", tuple(ratios.values())
        )

    def seconds_saved(self, out: int, width: int) -> float:
        """Return how many seconds columns saves over the other kinds in a call, at the class of rows with most gain."""
        found = [self._nearest_measured(out, width, c) for c in self.choose_by_class(out, width).columns]
        return max((out * width / (s[0] * s[1]) * (min(t[:2]) - t[2]) for s, t in filter(None, found)), default=0.0)

    def _time_ratios(self, out: int, width: int, kind: int = 1) -> dict[int, float]:
        """Return class of rows -> the time of a kind over that of linear, at the classes it was measured at.

        ``kind``: 1 for oneDNN, 2 for columns.
        """
        return {c: r for c in ALL_ROW_CLASSES if (r := self._time_ratio(out, width, c, kind)) is not None}

    def _time_ratio(self, out: int, width: int, rows: int, kind: int) -> float | None:
        found = self._nearest_measured(out, width, rows, kind)
        return None if found is None else found[1][kind] / found[1][0]

    def _nearest_measured(
        self, out: int, width: int, rows: int, kind: int = 2
    ) -> tuple[tuple[int, int, int], tuple[float, ...]] | None:
        """Return the nearest (rows, columns, class) at which ``kind`` was measured, and its times; None without one."""

        def distance(size: tuple[int, int, int]) -> float:
            return abs(math.log(out / size[0])) + abs(math.log(width / size[1]))

        found = [s for s, times in self.times.items() if s[2] == rows and len(times) > kind]
        if not found:
            return None
        size = min(found, key=distance)
        return size, self.times[size]


_lock = reset_after_fork(threading.Lock())
_tables: dict[str, MatmulTable] = {}


def matmul_table(
    dtype: torch.dtype, measure_times: Callable[[torch.dtype], Times] = measure_times, table_name: str = ""
) -> MatmulTable:
    """Return the table for matmuls of ``dtype``: the one this process has, one read from a file, or one measured now.

    ``table_name`` names what ``measure_times`` measures; '' stands for the kinds of matmul on weights as they lie.
    """
    if not onednn_supports(dtype):
        return MatmulTable({})
    expected_identity = table_identity(dtype, table_name)
    name = hashlib.sha256(json.dumps(expected_identity, sort_keys=True).encode()).hexdigest()[:16]
    try:
        path = cache_folder() / f"products-{name}.json"
    except RuntimeError:  # the user has no home directory, as in some containers
        path = None
    with _lock:
        key = f"{path}:{name}"
        if key not in _tables:
            times = None if path is None else read_times(path, expected_identity)
            if times is None:
                times = measure_times(dtype)
                if (
                    is_complete(times, table_name) and path is not None
                ):  # a busy machine may run out of the budget of time
                    write_times(path, expected_identity, times)
            _tables[key] = MatmulTable(times)
        return _tables[key]


def choose_matmul(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul to use for a weight (out, width), for each class of rows."""
    return _table_for(out, width, dtype).choose_by_class(out, width)


def seconds_saved(out: int, width: int, dtype: torch.dtype) -> float:
    """Return the seconds that the columns matmul saves in a call, for a weight (out, width)."""
    return _table_for(out, width, dtype).seconds_saved(out, width)


def choose_for_all_rows(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the one matmul to use for a weight (out, width) at any number of rows."""
    return _table_for(out, width, dtype).choose_for_all_rows(out, width)


def _table_for(out: int, width: int, dtype: torch.dtype) -> MatmulTable:
    """Return the table for a weight (out, width): an empty one where it is too thin, so that nothing is measured."""
    return MatmulTable({}) if min(out, width) < MIN_SIZE else matmul_table(dtype)


def choose_for_gradient(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul to use for the input gradient of a layer whose weight is (out, width)."""
    thin = min(out, width) < MIN_SIZE
    return (MatmulTable({}) if thin else matmul_table(dtype, measure_transposed, TRANSPOSED)).choose_by_class(
        width, out
    )


def read_times(path: Path, expected_identity: Mapping[str, Any]) -> Times | None:
    """Return the times in a file, or None where it is no complete table of ``expected_identity``."""
    try:
        with OpenedFile(path) as file:  # refuses anything but a plain file: reading a pipe would wait for ever
            if file.size > _MAX_FILE_BYTES:
                return None
            data = json.loads(file.read_bytes())
        if {k: data[k] for k in expected_identity} != dict(expected_identity):
            return None
        times: Times = {}
        for out, width, rows, *kinds in data["times"]:
            if not 2 <= len(kinds) <= 3:
                return None
            seconds = tuple(map(float, kinds))
            if not all(0 < s < math.inf for s in seconds):
                return None
            times[out, width, rows] = seconds
        return times if is_complete(times, expected_identity.get("of", "")) else None
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def write_times(path: Path, identity: Mapping[str, Any], times: Times) -> None:
    """Write the times to ``path`` as a whole; where that fails, leave what is there and raise nothing."""
    data = {**identity, "times": [[*size, *kinds] for size, kinds in times.items()]}
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(data))
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
