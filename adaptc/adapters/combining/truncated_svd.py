"""Cut matrices to a rank: the nearest product of two factors, and its error.

Matrices are (blocks, rows, columns). All blocks get factors of one rank, and the up factors contain the singular
values. The decomposition is torch's exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.passes.protocol.parts.low_rank import LowRank


@dataclass(frozen=True)
class Truncation:
    """The rule by which matrices are cut: to ``rank``, or to the least rank that keeps the part ``energy`` of their
    energy.

    Energy is the sum of the squared singular values. ``clamp`` is a quantile of the factors' entries to which larger
    ones are clamped.
    """

    rank: int | None = None
    energy: float | None = None
    clamp_quantile: float | None = None
    full_matrices: bool = False
    driver: str | None = None


def truncate(matrix: Tensor, truncation: Truncation) -> tuple[LowRank, float]:
    """Return the factors, and the Frobenius norm of the dropped terms divided by that of the matrix.

    The error does not count what ``cut.clamp`` takes from the factors.
    """
    return _keep_rank(*_svd(matrix, truncation), truncation)


def truncate_sum(changes: Sequence[LowRank], weights: Sequence[float], truncation: Truncation) -> tuple[LowRank, float]:
    """Return the factors and error of a weighted sum of low-rank products, where possible without multiplying them
    out."""
    up = torch.cat([p.up * (w * p.scale) for p, w in zip(changes, weights, strict=True)], 2)
    down = torch.cat([p.down for p in changes], 1)
    # Clamping depends on the signs of the factors' entries, which must be those of the full decomposition.
    if (
        truncation.clamp_quantile is not None
        or truncation.full_matrices
        or up.shape[2] >= min(up.shape[1], down.shape[2])
    ):
        return truncate(up @ down, truncation)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    u, s, vh = _svd(upper @ lower.mT, truncation)
    return _keep_rank(left @ u, s, vh @ right.mT, truncation)


def _svd(matrix: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    if truncation.driver is not None and matrix.device.type != "cuda":
        raise ConfigError(
            f"svd_driver={truncation.driver!r} chooses an algorithm of a GPU, and the adapters are on "
            f"{matrix.device.type!r}: leave it out"
        )
    try:
        return torch.linalg.svd(matrix, full_matrices=truncation.full_matrices, driver=truncation.driver)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise AdaptcError(f"the singular values of a {tuple(matrix.shape)} matrix were not found: {error}") from error


def _keep_rank(u: Tensor, s: Tensor, vh: Tensor, truncation: Truncation) -> tuple[LowRank, float]:
    max_rank = s.shape[-1]
    squares = s.double().square()
    rank = min(truncation.rank or max_rank, max_rank)
    if truncation.energy is not None:
        # All blocks have one rank, so the energy counts that all of them keep together.
        within = squares.sum(0).cumsum(0)
        rank = min(rank, int(torch.searchsorted(within, truncation.energy * within[-1] * (1 - 1e-12))) + 1)
    total, dropped = float(squares.sum()), float(squares[:, rank:].sum())
    up, down = u[:, :, :rank] * s[:, None, :rank], vh[:, :rank]
    if truncation.clamp_quantile is not None:
        most_allowed = _quantile(torch.cat([up.flatten(), down.flatten()]), truncation.clamp_quantile)
        if most_allowed <= 0:
            raise ConfigError(
                f"svd_clamp={truncation.clamp_quantile}: entries would be cut down to {most_allowed:.3g}, which leaves "
                "nothing of them; it must be nearer to 1"
            )
        whole = (u[:, :, :max_rank] * s[:, None]) @ vh[:, :max_rank]
        up, down = up.clamp(-most_allowed, most_allowed), down.clamp(-most_allowed, most_allowed)
        dropped = float((whole - up @ down).double().square().sum())
    return LowRank(down.contiguous(), up.contiguous()), (dropped / total) ** 0.5 if total else 0.0


def _quantile(values: Tensor, q: float) -> float:
    """Return ``torch.quantile`` for any number of values; torch's own is limited to some millions."""
    place = q * (values.numel() - 1)
    low = int(place)
    ordered = values.sort().values[low : low + 2]
    return float(torch.lerp(ordered[0], ordered[-1], place - low))
