"""Represent the change of a weight as the matmul of two factors, in one form for every layer.

A weight is a stack of matrices, called blocks: one block, or one for each expert or each group of a convolution. Kernel
positions are in the columns. The change of a block is ``scale * up @ down``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of a weight: ``down`` (blocks, rank, columns), ``up`` (blocks, rows, rank) and ``scale``.

    ``bias`` (blocks * rows,) is the change of the layer's bias before the scale; None for none.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return the rank of one block."""
        return self.down.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (blocks, rows, columns) of the weight."""
        return self.up.shape[0], self.up.shape[1], self.down.shape[2]

    def matrix(self) -> Tensor:
        """Return the change as matrices (blocks, rows, columns)."""
        return (self.up @ self.down) * self.scale
