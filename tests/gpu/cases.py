"""What the tests of kernels on a GPU share: the device, sizes, matrices there, and what rounding allows."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tests.kernels import matrices
from tests.kernels.matrices import rounding

DEVICE = torch.device(os.environ.get("ADAPTC_GPU_TESTS_ON", "cuda"))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: of the base and of the adapter; the last is what PEFT keeps beside a base in half precision
TYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32))
NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16"}
EPS = torch.finfo(F32).eps
SCALE = 0.3

#: rows, columns, length of the sums, rank: primes and whole tiles, rows within what one kernel takes and beyond it
SIZES = (
    (1, 31, 67, 1),
    (5, 131, 257, 7),
    (16, 64, 512, 16),
    (13, 4099, 1031, 33),
    (16, 256, 4096, 128),
    (17, 127, 131, 2),
    (67, 64, 1031, 17),
    (256, 512, 1024, 64),
    (521, 193, 641, 127),
)


def type_name(types: tuple[torch.dtype, ...]) -> str:
    return "-".join(NAMES[t] for t in types)


def size_name(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def on_device(t: Tensor) -> Tensor:
    """``t`` with all memory behind it, so that it keeps its layout, and the NaNs in the gaps."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def matrix(rows: int, cols: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    return on_device(matrices.matrix(rows, cols, dtype, layout, seed))


def vector(length: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return matrix(1, length, dtype, seed=seed)[0]


def number(value: float, dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def bits(t: Tensor) -> Tensor:
    """So that NaNs are equal if they are, and 0 is not -0."""
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def check_close(found: Tensor, exact: Tensor, wide: Tensor) -> None:
    """``wide`` is what float32 may cost before the one rounding to the type of the result."""
    allowed = rounding(exact.abs() + wide, found.dtype) * (1 + 2**-10) + wide
    excess = (found.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"beyond what rounding allows by {excess.max()}, values up to {exact.abs().max()}"
