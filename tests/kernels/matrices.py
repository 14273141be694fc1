"""Matrices for the tests of kernels: odd sizes, every layout a weight may have, and how exact a result can be."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: One, primes, one more and one less than a tile, and whole tiles.
SIZES = st.sampled_from([1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 131])
RANKS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 67, 96, 127, 128])
#: With a type for the weight and for each of its factors.
TYPES = st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)) | st.sampled_from(
    [(t, t, t) for t in DTYPES]
)
LAYOUTS = st.sampled_from(["contiguous", "wider", "transposed", "strided"])
SCALES = st.sampled_from([0.5, 2.0, -1.0, 1.0, 0.0, 0.3])


def matrix(
    rows: int, cols: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0, between: float = torch.nan
) -> Tensor:
    """Normal values, in memory as ``layout`` says; what lies between them is NaN, which shows where it is read."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return _laid_out(values, layout, between)


def whole(rows: int, cols: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Whole numbers from -3 to 3: sums of their products are exact in float32, in whatever order."""
    values = torch.randint(-3, 4, (rows, cols), generator=torch.Generator().manual_seed(seed))
    return _laid_out(values.to(dtype), layout, torch.nan)


def _laid_out(values: Tensor, layout: str, between: float) -> Tensor:
    rows, cols = values.shape
    room = {
        "contiguous": lambda: values.clone(),
        "wider": lambda: values.new_full((rows, cols + 5), between)[:, 2 : cols + 2],
        "transposed": lambda: values.new_full((cols, rows + 3), between)[:, 3:].T,
        "strided": lambda: values.new_full((2 * rows, 3 * cols), between)[::2, ::3],
    }[layout]()
    return room.copy_(values)


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between values of ``dtype`` about each number: what one rounding may cost."""
    info = torch.finfo(dtype)
    power = torch.floor(torch.log2(exact.abs().clamp_min(info.smallest_normal)))
    return torch.exp2(power) * info.eps / 2


def product_error(left: Tensor, right: Tensor) -> Tensor:
    """What float32 may cost left @ right, summed up in any order."""
    terms = left.shape[1] + 1
    return terms * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs())


def far_rows(rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros in bfloat16 (rows, cols), whose third row begins beyond what int32 can count.

    On a CPU only the memory of the rows themselves is ever touched, so most of the 4 GiB are never there.
    """
    stride = 2**30 + 5
    count = (rows - 1) * stride + cols
    memory = torch.empty(0, dtype=torch.bfloat16, device=device)
    far = memory.set_(torch.UntypedStorage(2 * count, device=device), 0, (rows, cols), (stride, 1))
    return far.zero_()
