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
from adaptc.passes.protocol.low_rank import LowRank


@dataclass(frozen=True)
class Cut:
    """The rule by which matrices are cut: to ``rank``, or to the least rank that keeps the part ``energy`` of their
    energy.

    Energy is the sum of the squared singular values. ``clamp`` is a quantile of the factors' entries to which larger
    ones are clamped.
    """

    rank: int | None = None
    energy: float | None = None
    clamp: float | None = None
    full: bool = False
    driver: str | None = None


def truncated(matrix: Tensor, cut: Cut) -> tuple[LowRank, float]:
    """Return the factors, and the Frobenius norm of the dropped terms divided by that of the matrix.

    The error does not count what ``cut.clamp`` takes from the factors.
    """
    return _kept(*_decomposed(matrix, cut), cut)


def truncated_sum(parts: Sequence[LowRank], weights: Sequence[float], cut: Cut) -> tuple[LowRank, float]:
    """Return the factors and error of a weighted sum of low-rank products, where possible without multiplying them
    out."""
    up = torch.cat([p.up * (w * p.scale) for p, w in zip(parts, weights, strict=True)], 2)
    down = torch.cat([p.down for p in parts], 1)
    # Clamping depends on the signs of the factors' entries, which must be those of the full decomposition.
    if cut.clamp is not None or cut.full or up.shape[2] >= min(up.shape[1], down.shape[2]):
        return truncated(up @ down, cut)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    u, s, vh = _decomposed(upper @ lower.mT, cut)
    return _kept(left @ u, s, vh @ right.mT, cut)


def _decomposed(matrix: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    if cut.driver is not None and matrix.device.type != "cuda":
        raise ConfigError(
            f"svd_driver={cut.driver!r} chooses an algorithm of a GPU, and the adapters are on "
            f"{matrix.device.type!r}: leave it out"
        )
    try:
        return torch.linalg.svd(matrix, full_matrices=cut.full, driver=cut.driver)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise AdaptcError(f"the singular values of a {tuple(matrix.shape)} matrix were not found: {error}") from error


def _kept(u: Tensor, s: Tensor, vh: Tensor, cut: Cut) -> tuple[LowRank, float]:
    most = s.shape[-1]
    squares = s.double().square()
    rank = min(cut.rank or most, most)
    if cut.energy is not None:
        # All blocks have one rank, so the energy counts that all of them keep together.
        within = squares.sum(0).cumsum(0)
        rank = min(rank, int(torch.searchsorted(within, cut.energy * within[-1] * (1 - 1e-12))) + 1)
    total, left = float(squares.sum()), float(squares[:, rank:].sum())
    up, down = u[:, :, :rank] * s[:, None, :rank], vh[:, :rank]
    if cut.clamp is not None:
        most_allowed = _quantile(torch.cat([up.flatten(), down.flatten()]), cut.clamp)
        if most_allowed <= 0:
            raise ConfigError(
                f"svd_clamp={cut.clamp}: entries would be cut down to {most_allowed:.3g}, which leaves nothing of "
                "them; it must be nearer to 1"
            )
        whole = (u[:, :, :most] * s[:, None]) @ vh[:, :most]
        up, down = up.clamp(-most_allowed, most_allowed), down.clamp(-most_allowed, most_allowed)
        left = float((whole - up @ down).double().square().sum())
    return LowRank(down.contiguous(), up.contiguous()), (left / total) ** 0.5 if total else 0.0


def _quantile(values: Tensor, q: float) -> float:
    """Return ``torch.quantile`` for any number of values; torch's own is limited to some millions."""
    place = q * (values.numel() - 1)
    low = int(place)
    ordered = values.sort().values[low : low + 2]
    return float(torch.lerp(ordered[0], ordered[-1], place - low))
