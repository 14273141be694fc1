"""Describe a merged weight for the report of a merge: its largest change, and its largest rounding error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor


class MergeErrors:
    """The largest change of a weight by a merge, and the largest rounding error, as a pair of floats.

    They are measured at the first call, since most reports are never read. The tensors are kept until then. Both are
    NaN if the weight, before or after the merge, was written to in between.
    """

    def __init__(self, exact: Callable[[], Tensor], stored: Tensor, rounded: Tensor) -> None:
        self._tensors: Any = exact, stored, rounded
        self._versions = _versions(stored, rounded)
        self._is_plain = type(rounded) in (Tensor, torch.nn.Parameter)
        self._errors = nan, nan

    def __call__(self) -> tuple[float, float]:
        if self._tensors is not None:
            exact, stored, rounded = self._tensors
            self._tensors = None
            if _versions(stored, rounded) == self._versions:
                is_exact = self._is_plain and rounded.dtype.to_real() in (torch.float32, torch.float64)
                value = rounded if is_exact else exact()
                error = 0.0 if is_exact else _largest_difference(value, rounded)
                self._errors = _largest_difference(value, stored), error
        return self._errors


@dataclass(frozen=True)
class SiteMerge:
    """A merged weight: ``delta`` is the largest change of an element, ``error`` the largest rounding error of one.

    With a low-rank correction beside the weight, of rank ``correction_rank``, the error is what that leaves.
    ``rounding_error`` is the error without it.
    """

    site: str
    fqn: str
    dtype: torch.dtype
    measure_errors: Callable[[], tuple[float, float]] = field(repr=False, compare=False)
    untied: bool = False
    correction_rank: int = 0
    left_error: float = field(default=nan, repr=False)

    @property
    def delta(self) -> float:
        return self.measure_errors()[0]

    @property
    def rounding_error(self) -> float:
        return self.measure_errors()[1]

    @property
    def error(self) -> float:
        return self.left_error if self.correction_rank else self.rounding_error


def _versions(*tensors: Tensor) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two elements; NaN for integers, and for tensors of different shapes."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return nan
    if not a.numel():
        return 0.0
    if a.is_complex():
        return float((a - b).abs().max())
    low, high = torch.aminmax(a - b)
    return max(abs(float(low)), abs(float(high)))
