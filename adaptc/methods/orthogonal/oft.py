"""OFT: x' = x R with R orthogonal and block-diagonal (Qiu et al., arXiv 2306.07280; Liu et al., 2506.19847).

Slots, in PEFT's shapes: ``oft_R.weight`` (n/b, b(b-1)/2), at embeddings ``oft_embedding_R.weight``; one row with
``block_share``. A row is the upper triangle of a skew-symmetric matrix Q. Its block is (I - Q)(I + Q)^-1, or with
``use_cayley_neumann`` a polynomial near (I + Q)(I - Q)^-1. These two rotate in opposite directions, so a file means
something only together with that option.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_bias, check_probability
from adaptc.methods.orthogonal.rotation import (
    MAX_TERMS,
    Rotation,
    cayley_neumann,
    cayley_transform,
    divisors,
    drop_to_identity,
    multiply_blocks,
    skew_symmetric,
    to_solver_dtype,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots


@dataclass
class OFTConfig(TargetedConfig):
    """PEFT's ``OFTConfig``: same names, same defaults. Either ``r`` or ``oft_block_size`` must be 0.

    Attributes:
        r: the number of blocks of a layer; 0 where ``oft_block_size`` is given.
        oft_block_size: the size of a block; 0 where ``r`` is given.
        module_dropout: the probability that a block is the identity in training; PEFT reads the option and ignores it.
        coft: whether rotations stay within ``eps`` of the identity.
        eps: the limit of ``coft``.
        block_share: whether all blocks of a layer share one rotation.
        use_cayley_neumann: whether the inverse in the Cayley transform is a Neumann series.
        num_cayley_neumann_terms: the number of terms of the series.

    Example:
        >>> config = adaptc.OFTConfig(oft_block_size=32, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "OFT"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 0 or self.oft_block_size < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"OFTConfig needs one of r and oft_block_size to be positive and the other 0, since the width of a "
                f"layer is their product; got r={self.r} and oft_block_size={self.oft_block_size}"
            )
        check_bias(self, "oft_only")
        check_probability(self, "module_dropout", allow_one=True)
        if self.coft and not self.eps > 0:
            raise ConfigError(f"OFTConfig.eps, the radius that coft keeps to, must be positive, got {self.eps!r}")
        if self.use_cayley_neumann and not 2 <= self.num_cayley_neumann_terms <= MAX_TERMS:
            raise ConfigError(
                "OFTConfig.num_cayley_neumann_terms must be 2 or more, or no rotation would ever differ from the "
                f"identity, and at most {MAX_TERMS}, since each is a product in the program; "
                f"got {self.num_cayley_neumann_terms}. use_cayley_neumann=False is the sum of all terms."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        if "oft_block_size" not in data:
            raise ConfigError(
                "this OFT config has no oft_block_size: it is of PEFT 0.13 or older, whose OFT computed something "
                "else. Train the adapter again with a newer release."
            )
        written = data.get("peft_version", "0.0")
        version = re.match(r"(\d{1,9})\.(\d{1,9})", written) if isinstance(written, str) else None
        new = super().from_dict(data)
        if (
            "use_cayley_neumann" in data
            and new.use_cayley_neumann
            and version
            and tuple(map(int, version.groups())) < (0, 18)
        ):
            warnings.warn(
                "this OFT adapter was written by PEFT before 0.18, whose Cayley-Neumann series was another one: its "
                "outputs will differ from those it was trained with",
                AdaptcWarning,
                stacklevel=2,
            )
        return new

    def method(self, name: str, kind: str) -> Oft:
        return Oft(
            blocks=self.r,
            size=self.oft_block_size,
            radius=self.eps if self.coft else 0.0,
            share=self.block_share,
            terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else 0,
            dropout=self.module_dropout,
            scheme=self.init_weights,
        )


@dataclass(frozen=True)
class Oft(Rotation):
    """OFT at one site. ``terms`` 0: the exact Cayley transform. ``radius`` 0: no constraint."""

    name: ClassVar[str] = "oft"
    swappable: ClassVar[frozenset[str]] = frozenset({"dropout", "scheme", "training"})

    blocks: int = 0
    size: int = 32
    radius: float = 0.0
    share: bool = False
    terms: int = 5
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def rotation_size(self, op: Op) -> int:
        # The channels of all groups of a convolution, since PEFT's blocks cover all channels of the input.
        n = super().rotation_size(op)
        return n if op.kind == "embedding" else op.in_features * prod(op.kernel)

    def block_size(self, op: Op) -> int:
        """Return the size of a block.

        It is the divisor of the width nearest to ``size``, or the width over its divisor nearest to ``blocks``.
        """
        n, asked = self.rotation_size(op), self.size or self.blocks
        fits = asked if n % asked == 0 else min(divisors(n), key=lambda d: abs(d - asked))
        return fits if self.size else n // fits

    def slots(self, op: Op) -> dict[str, Slot]:
        b = self.block_size(op)
        name = "oft_embedding_R.weight" if op.kind == "embedding" else "oft_R.weight"
        return {name: Slot((1 if self.share else self.rotation_size(op) // b, b * (b - 1) // 2))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        n, b = self.rotation_size(op), self.block_size(op)
        field, asked, used = ("oft_block_size", self.size, b) if self.size else ("r", self.blocks, n // b)
        if asked != used:
            empty = "; blocks of size 1 have nothing to train" if b == 1 else ""
            warnings.warn(
                f"OFTConfig.{field}={asked} does not divide the width {n} of a layer, which gets {field}={used}{empty}",
                AdaptcWarning,
                stacklevel=2,
            )
        if self.scheme:
            return super().init(op, W, dtype, generator)
        values = {n: torch.empty(s.shape).normal_(0.0, 0.1, generator=generator) for n, s in self.slots(op).items()}
        return InitialValues({n: t.to(dtype) for n, t in values.items()})

    def can_rotate_input(self, op: Op) -> bool:
        return op.is_pointwise or (op.is_conv and all(k == 1 for k in op.kernel))

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        if op.groups == 1:
            return super().weight(op, W, slots, scale)
        if op.matrix_shape[1] % self.block_size(op):
            return super().weight(op, op.dense(W), slots, scale)
        # No block spans two groups: rows of all groups, put side by side, form one row of the full width.
        rows = W.reshape(op.groups, -1, op.matrix_shape[1]).transpose(0, 1)
        turned = super().weight(op, rows, slots, scale)
        return turned.transpose(0, 1).reshape(W.shape)

    def rotate(self, op: Op, v: Tensor, slots: Slots, transpose: bool = False) -> Tensor:
        b = self.block_size(op)
        R = cast(self.rotation_blocks(b, next(iter(slots.values()))), v.dtype)
        R = R.mT if transpose else R
        return (v.unflatten(-1, (-1, b)) @ R[0]).flatten(-2) if self.share else multiply_blocks(v, R)

    def rotation_blocks(self, b: int, rows: Tensor) -> Tensor:
        """Return the blocks of R, (rows, b, b), for the slot ``rows`` (rows, b(b-1)/2)."""
        Q = self._within_radius(skew_symmetric(to_solver_dtype(rows), b))
        R = cayley_neumann(Q, self.terms) if self.terms else cayley_transform(Q)
        return drop_to_identity(R, self.dropout) if self.training and self.dropout and not self.share else R

    def _within_radius(self, Q: Tensor) -> Tensor:
        """Return ``Q`` (rows, b, b) with each block shortened to the radius.

        The gradient is that at the shortened block, as if the parameter had been moved there: PEFT moves it.
        """
        if not self.radius:
            return Q
        q = Q.detach()
        return Q + (self._shorten(q, torch.linalg.matrix_norm(q, keepdim=True)) - q)

    def _shorten(self, blocks: Tensor, norm: Tensor) -> Tensor:
        radius = self.radius / sqrt(blocks.shape[0])
        return torch.where(norm <= radius, blocks, blocks * (radius / norm))

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the rows shortened so that their blocks are inside the radius; {} without a radius.

        A block has each number of its row twice, so its norm is sqrt(2) times the row's.
        """
        if not self.radius:
            return {}
        return {
            n: self._shorten(t, torch.linalg.vector_norm(t, dim=-1, keepdim=True) * sqrt(2)) for n, t in slots.items()
        }
