"""How long products take on this machine, as they lie in a model: weights that are in no near cache.

Before: nothing. After: the least time of each kind at a few sizes of weights and numbers of rows, as many as fit in.
The kinds take turns, so that what slows the machine down slows both; the least of several times is what the code itself
takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.ir.product import ALL_CLASSES, ONEDNN, by_columns, product, row_class
from adaptc.progress import stage
from adaptc.torch_modes import AUTOCAST_DEVICES, in_transform

#: (rows, columns of a weight, class of rows) -> seconds of linear, of oneDNN, and of columns where they are measured
Times = dict[tuple[int, int, int], tuple[float, ...]]
#: (pool, size of a weight, rows, when to end) -> the least time of each kind, None where there is none left
Kinds = Callable[[Tensor, tuple[int, int], int, float], Sequence[float] | None]

#: the name of times of weights that are transposed views, and of those of adapters
TURNED, ADAPTERS = "turned", "adapters"
#: what is measured, as a log calls it
_CALLED = {
    "": "matmuls",
    TURNED: "matmuls of gradients",
    ADAPTERS: "matmuls of adapters",
    "packed": "matmuls of packed weights",
}
#: weights that are measured
SIZES = ((256, 256), (576, 576), (1536, 576), (576, 1536), (2048, 2048))
#: factors of adapters that are measured, at the classes of few and of many rows: a narrow one and a wide one, whose
#: difference is the work
FACTORS, FACTOR_CLASSES = ((1024, 16), (1024, 80)), (1, 3)
#: rows that stand for each class
ROWS = (1, 3, 8, 96, 384)
#: the first of the classes that gradients are measured at: who trains has more rows than a few
GRADIENTS = 3
#: the classes at which the product of columns is measured: with more rows it has nothing to gain
FEW = (0, 1)
#: seconds for all of it; what does not fit in is left out, and so computed by linear
BUDGET = 0.9
#: operations of one product above which none is measured: a smaller weight says as much
_MOST_WORK = 2e9
#: times that each kind is measured at once, and the fewest that count
_ROUNDS, _FEWEST = 4, 3
#: how often all of it is measured: what disturbs one size for a moment is gone when its turn comes again
_SWEEPS = 3
#: bytes of the memory that weights are taken from, and how many at most, far apart: several times what near caches
#: hold, which decides at few rows, where the kinds differ in how they wait for memory
_POOL, _WEIGHTS = 128_000_000, 24


def measure(dtype: torch.dtype, kinds: Kinds | None = None, of: str = "") -> Times:
    """Times of products of ``dtype``, in about :data:`BUDGET` seconds at most; none where a mode is on that makes other
    things of tensors. ``kinds`` measures others than linear, oneDNN and columns, ``of`` is what it measures."""
    if in_transform():
        return {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        pool = torch.full((_POOL // dtype.itemsize,), 0.5, dtype=dtype, device="cpu")
        if type(pool) is not Tensor:
            return {}
        with stage(f"timing {_CALLED.get(of, of)} in {str(dtype).removeprefix('torch.')}"):
            return _measure(pool, kinds or _kinds, of)


def measure_turned(dtype: torch.dtype) -> Times:
    """The same with weights that are transposed views of others, as in gradients of inputs."""
    return measure(dtype, _turned, TURNED)


def complete(times: Times, of: str = "") -> bool:
    """Whether all was measured, and nothing else."""
    return set(times) == {(*size, c) for size, c, _ in _wanted(of)}


def _wanted(of: str = "") -> list[tuple[tuple[int, int], int, int]]:
    """Size, class and number of rows of what is measured. Few rows first: they gain most."""
    classes = list(zip(ALL_CLASSES, ROWS, strict=True))
    if of == ADAPTERS:
        return [(s, c, n) for c, n in classes if c in FACTOR_CLASSES for s in FACTORS]
    classes = classes[GRADIENTS if of == TURNED else 0 :]
    return [(s, c, n) for c, n in classes for s in SIZES if 2 * n * s[0] * s[1] <= _MOST_WORK]


def _measure(pool: Tensor, measured: Kinds, of: str) -> Times:
    out: Times = {}
    end = time.perf_counter() + BUDGET
    for _ in range(_SWEEPS):
        for size, rows, number in _wanted(of):
            found = measured(pool, size, number, end)
            if found is None:
                return out
            key = (*size, rows)
            out[key] = tuple(map(min, found, out.get(key, found)))
    return out


def _kinds(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    return least(as_they_lie(*operands(pool, size, rows)), end)


def _turned(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> Sequence[float] | None:
    x, _ = operands(pool, size, rows)
    _, stored = operands(pool, (size[1], size[0]), rows)
    weights = [w.t() for w in stored]
    return least([plain(x, weights), by_onednn(x, weights)], end)


def as_they_lie(x: Tensor, weights: Sequence[Tensor]) -> list[Callable[[int], Tensor]]:
    """All kinds of product that are measured at so many rows, of weights without a packed copy."""
    kinds = [plain(x, weights), by_onednn(x, weights)]
    few = row_class(x.shape[0]) in FEW
    return [*kinds, lambda n: by_columns(x, weights[n % len(weights)], None)] if few else kinds


def operands(pool: Tensor, size: tuple[int, int], rows: int) -> tuple[Tensor, list[Tensor]]:
    """What is multiplied, and as many weights as there are."""
    numel = size[0] * size[1]
    x = pool[: rows * size[1]].view(rows, size[1])
    places = pool.numel() // numel
    step = max(1, places // _WEIGHTS)
    return x, [pool[i * numel : (i + 1) * numel].view(size) for i in range(0, places, step)]


def plain(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Products by linear, each with the weight of a number."""
    return lambda n: F.linear(x, weights[n % len(weights)])


def by_onednn(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Products by oneDNN, each with the weight of a number."""
    return lambda n: product(x, weights[n % len(weights)], None, ONEDNN, ALL_CLASSES)


def least(kinds: Sequence[Callable[[int], Any]], end: float) -> list[float] | None:
    """The least time of each kind, which take turns, each time with another number; None where there is no time until
    ``end`` for enough of them."""
    best = [float("inf")] * len(kinds)
    for turn in range(_ROUNDS + 1):
        if time.perf_counter() > end:
            return best if turn > _FEWEST else None
        for i, run in enumerate(kinds):
            start = time.perf_counter()
            run(turn * len(kinds) + i)
            if turn:  # not the first, which prepares
                best[i] = min(best[i], time.perf_counter() - start)
    return best
