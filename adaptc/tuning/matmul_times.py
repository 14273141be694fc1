"""Measure how long each kind of matmul takes on this machine, with weights that are in no near cache, as in a model.

The result is the least time of each kind at a few sizes of weights and numbers of rows. A budget of time limits how
many. The kinds take turns, so that a load on the machine slows all of them. The least of several times is taken as the
time of the code itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, ONEDNN, linear_matmul, row_class, transposed_matmul
from adaptc.progress import stage
from adaptc.torch_modes import AUTOCAST_DEVICES, in_transform

#: (rows of a weight, columns of a weight, class of rows) -> seconds of linear, of oneDNN, and of columns if measured
Times = dict[tuple[int, int, int], tuple[float, ...]]
#: (pool, size of a weight, rows, when to end) -> the least seconds of each kind; None where the time ran out
TimeMatmuls = Callable[[Tensor, tuple[int, int], int, float], Sequence[float] | None]

#: the names of tables of times: for weights that are transposed views, and for adapters
TRANSPOSED, ADAPTERS = "turned", "adapters"
#: name of a table -> what is measured for it, as logs call it
_TABLE_TITLES = {
    "": "matmuls",
    TRANSPOSED: "matmuls of gradients",
    ADAPTERS: "matmuls of adapters",
    "packed": "matmuls of packed weights",
}
#: (rows, columns) of the weights that are measured
SIZES = ((256, 256), (576, 576), (1536, 576), (576, 1536), (2048, 2048))
#: (width, rank) of the adapter factors that are measured, a narrow and a wide one, whose difference in time is the
#: work; and the classes of rows, few and many, that they are measured at
FACTORS, FACTOR_CLASSES = ((1024, 16), (1024, 80)), (1, 3)
#: the number of rows that stands for each class
ROWS_OF_CLASS = (1, 3, 8, 96, 384)
#: the first of the classes that gradients are measured at: training has more than a few rows
FIRST_GRADIENT_CLASS = 3
#: the classes at which the columns matmul is measured: with more rows it has nothing to gain
FEW_ROW_CLASSES = (0, 1)
#: seconds for a whole table; sizes that do not fit in are left out
BUDGET_SECONDS = 0.9
#: the most operations of one matmul that is measured: a smaller weight tells as much
_MAX_OPERATIONS = 2e9
#: the number of times that each kind is run in a row of turns, and the fewest that count
_ROUNDS, _MIN_ROUNDS = 4, 3
#: how often the whole table is measured: a moment's load at one size is over when its turn comes again
_SWEEPS = 3
#: bytes of the memory that weights are views of, and about how many weights, far apart: several times what near caches
#: hold. At few rows that decides, since the kinds differ in how they wait for memory
_POOL_BYTES, _WEIGHT_COUNT = 128_000_000, 24


def measure_times(dtype: torch.dtype, time_matmuls: TimeMatmuls | None = None, table_name: str = "") -> Times:
    """Measure matmuls of ``dtype``, in about :data:`BUDGET_SECONDS` seconds at most, and return their times.

    ``time_matmuls`` measures one size; by default linear, oneDNN and columns. ``table_name`` names the table. Nothing
    is measured in a transform of ``torch.func`` or under a mode that makes other objects than plain tensors.
    """
    if in_transform():
        return {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        pool = torch.full((_POOL_BYTES // dtype.itemsize,), 0.5, dtype=dtype, device="cpu")
        if type(pool) is not Tensor:
            return {}
        with stage(f"timing {_TABLE_TITLES.get(table_name, table_name)} in {str(dtype).removeprefix('torch.')}"):
            return _measure_table(pool, time_matmuls or _time_unpacked, table_name)


def measure_transposed(dtype: torch.dtype) -> Times:
    """Measure linear and oneDNN with weights that are transposed views, as in the gradients of inputs."""
    return measure_times(dtype, _time_transposed, TRANSPOSED)


def is_complete(times: Times, table_name: str = "") -> bool:
    """Return whether ``times`` has every size and class that the table ``table_name`` is measured at, and no other."""
    return set(times) == {(*size, c) for size, c, _ in _table_entries(table_name)}


def _table_entries(table_name: str = "") -> list[tuple[tuple[int, int], int, int]]:
    """Return (size of a weight, class of rows, number of rows) of what is measured, few rows first: they gain most."""
    classes = list(zip(ALL_ROW_CLASSES, ROWS_OF_CLASS, strict=True))
    if table_name == ADAPTERS:
        return [(s, c, n) for c, n in classes if c in FACTOR_CLASSES for s in FACTORS]
    classes = classes[FIRST_GRADIENT_CLASS if table_name == TRANSPOSED else 0 :]
    return [(s, c, n) for c, n in classes for s in SIZES if 2 * n * s[0] * s[1] <= _MAX_OPERATIONS]


def _measure_table(pool: Tensor, time_matmuls: TimeMatmuls, table_name: str) -> Times:
    out: Times = {}
    end = time.perf_counter() + BUDGET_SECONDS
    for _ in range(_SWEEPS):
        for size, rows, number in _table_entries(table_name):
            found = time_matmuls(pool, size, number, end)
            if found is None:
                return out
            key = (*size, rows)
            out[key] = tuple(map(min, found, out.get(key, found)))
    return out


def _time_unpacked(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    return least_times(unpacked_matmuls(*make_operands(pool, size, rows)), end)


def _time_transposed(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    x, _ = make_operands(pool, size, rows)
    _, stored = make_operands(pool, (size[1], size[0]), rows)
    weights = [w.t() for w in stored]
    return least_times([by_linear(x, weights), by_onednn(x, weights)], end)


def unpacked_matmuls(x: Tensor, weights: Sequence[Tensor]) -> list[Callable[[int], Tensor]]:
    """Return the kinds of matmul x W^T that are measured for ``x`` (rows, width) on weights that are not packed.

    They are linear, oneDNN and, at few rows, columns. Each takes a number and uses the weight of that number.
    """
    kinds = [by_linear(x, weights), by_onednn(x, weights)]
    few = row_class(x.shape[0]) in FEW_ROW_CLASSES
    return [*kinds, lambda n: transposed_matmul(x, weights[n % len(weights)], None)] if few else kinds


def make_operands(pool: Tensor, size: tuple[int, int], rows: int) -> tuple[Tensor, list[Tensor]]:
    """Return x (rows, width) and the weights (out, width) that are multiplied, as views of ``pool``.

    ``size`` is (out, width). The weights lie far apart, so that one is out of cache when its turn comes again.
    """
    numel = size[0] * size[1]
    x = pool[: rows * size[1]].view(rows, size[1])
    places = pool.numel() // numel
    step = max(1, places // _WEIGHT_COUNT)
    return x, [pool[i * numel : (i + 1) * numel].view(size) for i in range(0, places, step)]


def by_linear(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Return a function that multiplies ``x`` by the weight of a number, by ``F.linear``."""
    return lambda n: F.linear(x, weights[n % len(weights)])


def by_onednn(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Return a function that multiplies ``x`` by the weight of a number, by oneDNN."""
    return lambda n: linear_matmul(x, weights[n % len(weights)], None, ONEDNN, ALL_ROW_CLASSES)


def least_times(functions: Sequence[Callable[[int], Any]], end: float) -> list[float] | None:
    """Return the least time of each kind in seconds; None where fewer than :data:`_MIN_ROUNDS` turns fit in until
    ``end``.

    The kinds take turns, each time with another number, and so another weight.
    """
    best = [float("inf")] * len(functions)
    for turn in range(_ROUNDS + 1):
        if time.perf_counter() > end:
            return best if turn > _MIN_ROUNDS else None
        for i, run in enumerate(functions):
            start = time.perf_counter()
            run(turn * len(functions) + i)
            if turn:  # the first turn also pays for preparations, such as loading code
                best[i] = min(best[i], time.perf_counter() - start)
    return best
