"""How long products take on this machine, as they lie in a model: weights that are in no near cache.

Before: nothing. After: the least time of each kind at a few sizes of weights and numbers of rows,
as many as fit in. The kinds take turns,
so that what slows the machine down slows both; the least of several times is what the code itself takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.ir.modes import AUTOCAST_DEVICES
from adaptc.passes.ir.product import ALL_CLASSES, ONEDNN, in_transform, product

#: (rows, columns of a weight, class of rows) -> seconds of linear and of oneDNN
Times = dict[tuple[int, int, int], tuple[float, float]]

#: weights that are measured
SIZES = ((256, 256), (576, 576), (1536, 576), (576, 1536), (2048, 2048))
#: rows that stand for each class
ROWS = (1, 8, 96, 384)
#: the first of the classes that gradients are measured at: who trains has more rows than a few
GRADIENTS = 2
#: seconds for all of it; what does not fit in is left out, and so computed by linear
BUDGET = 0.5
#: operations of one product above which none is measured: a smaller weight says as much
_MOST_WORK = 2e9
#: times that each kind is measured, and the fewest that count
_ROUNDS, _FEWEST = 6, 3
#: numbers in the memory that weights are taken from
_POOL = 9_000_000


def measure(dtype: torch.dtype, turned: bool = False) -> Times:
    """Times of products of ``dtype``, in about :data:`BUDGET` seconds at most; none where a mode is on that makes other
    things of tensors. ``turned``: with a weight that is the transposed view of another, as gradients of inputs are."""
    if in_transform():
        return {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        pool = torch.full((_POOL,), 0.5, dtype=dtype, device="cpu")
        return _measure(pool, turned) if type(pool) is Tensor else {}


def complete(times: Times, turned: bool = False) -> bool:
    """Whether all was measured."""
    return len(times) == len(_wanted(turned))


def _wanted(turned: bool = False) -> list[tuple[tuple[int, int], int, int]]:
    """Size, class and number of rows of what is measured. Few rows first: they gain most."""
    classes = list(zip(ALL_CLASSES, ROWS, strict=True))[GRADIENTS if turned else 0 :]
    return [(s, c, n) for c, n in classes for s in SIZES if 2 * n * s[0] * s[1] <= _MOST_WORK]


def _measure(pool: Tensor, turned: bool) -> Times:
    out: Times = {}
    end = time.perf_counter() + BUDGET
    for size, rows, number in _wanted(turned):
        pair = _pair(pool, size, number, end, turned)
        if pair is None:
            break
        out[(*size, rows)] = pair
    return out


def _pair(pool: Tensor, size: tuple[int, int], rows: int, end: float, turned: bool) -> tuple[float, float] | None:
    numel, at = size[0] * size[1], 0
    x = pool[: rows * size[1]].view(rows, size[1])
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda w: F.linear(x, w),
        lambda w: product(x, w, None, ONEDNN, ALL_CLASSES),
    ]
    best = [float("inf")] * len(kinds)
    for turn in range(_ROUNDS + 1):
        if time.perf_counter() > end:
            return (best[0], best[1]) if turn > _FEWEST else None
        for i, run in enumerate(kinds):
            at = 0 if at + 2 * numel > pool.numel() else at + numel
            piece = pool[at : at + numel]
            weight = piece.view(size[::-1]).t() if turned else piece.view(size)
            start = time.perf_counter()
            run(weight)
            if turn:  # not the first, which prepares
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]
