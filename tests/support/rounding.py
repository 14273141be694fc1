"""How far results may be apart: as far as their arithmetic rounds, and no further."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square of what ``found`` is off by."""
    off = found.detach().double() - exact.detach().double()
    return float(off.square().mean().sqrt()) if off.numel() else 0.0


def assert_no_less_accurate(found: Tensor, other: Tensor, exact: Tensor, factor: float = 1.1) -> None:
    """``found`` is hardly further from ``exact`` (float64) than ``other``, and both are near it."""
    assert found.dtype == other.dtype
    ours, others = rms(found, exact), rms(other, exact)
    assert ours <= factor * others + 1e-6, (ours, others)
    if exact.numel():
        assert ours <= 4 * torch.finfo(found.dtype).eps * float(exact.detach().abs().max()), ours


def assert_close_to_rounding(
    found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, factor: float = 1.0
) -> None:
    """No number is off by more than ``factor`` the last place of the largest, in ``dtype`` (that of ``found``)."""
    assert found.dtype == expected.dtype
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    atol = factor * torch.finfo(dtype or found.dtype).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
