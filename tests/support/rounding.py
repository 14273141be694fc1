"""How far results may be apart: as far as their arithmetic rounds, and no further."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square of what ``found`` is off by."""
    off = found.detach().double() - exact.detach().double()
    return float(off.square().mean().sqrt()) if off.numel() else 0.0


def no_further(found: Tensor, theirs: Tensor, exact: Tensor, times: float = 1.1) -> None:
    """``found`` is hardly further from ``exact`` (float64) than ``theirs``, and both are near it."""
    assert found.dtype == theirs.dtype
    ours, others = rms(found, exact), rms(theirs, exact)
    assert ours <= times * others + 1e-6, (ours, others)
    if exact.numel():
        assert ours <= 4 * torch.finfo(found.dtype).eps * float(exact.detach().abs().max()), ours


def to_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, times: float = 1.0) -> None:
    """No number is off by more than ``times`` the last place of the largest, in ``dtype`` (that of ``found``)."""
    assert found.dtype == expected.dtype
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    atol = times * torch.finfo(dtype or found.dtype).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
