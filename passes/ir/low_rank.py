"""The change of a weight as a product of two factors, in one shape for every layer.

A weight stands here as blocks of matrices: one block, or one for each expert or each group of a convolution; kernel
positions are in the columns. The change of a block is ``scale * up @ down``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """``down`` (blocks, rank, columns), ``up`` (blocks, rows, rank). ``bias``: what is added to the layer's bias,
    (blocks * rows,), before the scale; None for nothing."""

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of one block."""
        return self.down.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, rows, columns) of the weight."""
        return self.up.shape[0], self.up.shape[1], self.down.shape[2]

    def matrix(self) -> Tensor:
        """The change, multiplied out: (blocks, rows, columns)."""
        return (self.up @ self.down) * self.scale
