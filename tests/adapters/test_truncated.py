"""Matrices cut to a rank: the error that is told is the distance of the factors' product."""

from __future__ import annotations

import pytest
import torch

from adaptc.adapters.combining.truncated_svd import Truncation, truncate, truncate_sum
from adaptc.passes.protocol.parts.low_rank import LowRank


@pytest.mark.parametrize(
    "cut",
    [
        Truncation(rank=3),
        Truncation(energy=0.8),
        Truncation(rank=3, clamp_quantile=0.8),
        Truncation(clamp_quantile=0.9, full_matrices=True),
    ],
)
def test_the_error_is_the_distance(cut: Truncation) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in ((11, 5), (5, 7)))
    matrix = up @ down
    for part, error in (truncate(matrix, cut), truncate_sum([LowRank(down, up)], [1.0], cut)):
        found = torch.linalg.vector_norm(part.up @ part.down - matrix) / torch.linalg.vector_norm(matrix)
        assert error == pytest.approx(float(found), abs=1e-12)
        assert error > 1e-3
