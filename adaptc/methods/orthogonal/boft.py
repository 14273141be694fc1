"""BOFT: W' = diag(s) W Q^T, Q a product of butterfly factors (Liu et al., arXiv 2311.06243).

Slots, in PEFT's shapes: ``boft_R`` (m, n/b, b, b), of which only the skew-symmetric part matters, and ``boft_s``
(out, 1), at convolutions (1, out). Factor i is a block-diagonal rotation between a permutation and its inverse. The
permutation acts on the halves of blocks of size b: in every run of b 2^i entries it puts the even halves first. For
factor 0 it is the identity. Q = F_(m-1) ... F_1 F_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_bias, check_probability
from adaptc.methods.orthogonal.rotation import (
    Rotation,
    cayley_transform,
    divisors,
    drop_to_identity,
    multiply_blocks,
    to_solver_dtype,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat


@dataclass
class BOFTConfig(TargetedConfig):
    """PEFT's ``BOFTConfig``: same names, same defaults. Either ``boft_block_size`` or ``boft_block_num`` must be 0.

    Attributes:
        boft_block_size: the size of a block; 0 where ``boft_block_num`` is given.
        boft_block_num: the number of blocks; 0 where ``boft_block_size`` is given.
        boft_n_butterfly_factor: the number of butterfly factors. It is always honoured; PEFT uses 1 where it cannot
            compile its CUDA extension.
        boft_dropout: the share of one factor's blocks that become the identity in training, spread over all factors.

    Example:
        >>> config = adaptc.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "BOFT"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size, num = self.boft_block_size, self.boft_block_num
        if size < 0 or num < 0 or (size == 0) == (num == 0):
            raise ConfigError(
                "BOFTConfig needs one of boft_block_size and boft_block_num to be positive and the other 0, since the "
                f"width of a layer is their product; got boft_block_size={size} and boft_block_num={num}"
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(
                f"BOFTConfig.boft_n_butterfly_factor must be 1 or more, got {self.boft_n_butterfly_factor}"
            )
        check_bias(self, "boft_only")
        check_probability(self, "boft_dropout", allow_one=True)

    def method(self, name: str, kind: str) -> Boft:
        return Boft(
            size=self.boft_block_size,
            number=self.boft_block_num,
            factors=self.boft_n_butterfly_factor,
            dropout=self.boft_dropout,
            scheme=self.init_weights,
        )


class BoftFiles(FileFormat):
    method: Boft

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the slots, with identity factors added where the file has one factor only.

        PEFT without its CUDA extension has one factor, whatever the config says.
        """
        R = found.get("boft_R")
        if R is None or R.ndim != 4 or R.shape[0] != 1 or self.method.factors == 1:
            return dict(found)
        more = R.new_zeros(self.method.factors - 1, *R.shape[1:])
        return {**found, "boft_R": torch.cat([R, more])}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the tensors of a file: the inverse of :meth:`read`.

        Only the first factor is written where all others are the identity, which training never leaves them. Where the
        first is the identity too, nothing was trained, and all factors are written.
        """
        if self.method.factors == 1:
            return dict(slots)
        R = slots["boft_R"]
        turns = (R.mT != R).flatten(1).any(1).tolist()
        return {**slots, "boft_R": R[:1]} if turns[0] and not any(turns[1:]) else dict(slots)


@dataclass(frozen=True)
class Boft(Rotation):
    """BOFT at one site.

    ``dropout``: in training, the share of one factor's blocks that become the identity, spread over all factors.
    """

    name: ClassVar[str] = "boft"
    swappable: ClassVar[frozenset[str]] = frozenset({"dropout", "scheme", "training"})
    files = BoftFiles()

    size: int = 4
    number: int = 0
    factors: int = 1
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def block_size(self, op: Op) -> int:
        """Return the size of a block; raise TargetError where blocks and butterfly factors do not divide the width."""
        n, m = self.rotation_size(op), self.factors
        field, requested = ("boft_block_size", self.size) if self.size else ("boft_block_num", self.number)

        def is_valid(d: int) -> bool:
            b = d if self.size else n // d
            # The number of blocks must be divisible by 2 ** (m - 1). The test by bits comes first, since for a huge m
            # that power would not fit into memory.
            return m == 1 or (b % 2 == 0 and m <= (n // b).bit_length() and (n // b) % 2 ** (m - 1) == 0)

        if n % requested or not is_valid(requested):
            good = [d for d in divisors(n) if is_valid(d)]
            butterflies = "" if m == 1 else f" with boft_n_butterfly_factor={m}"
            way = f"one of {good} fits" if good else "none fits: use fewer factors"
            raise TargetError(f"BOFT cannot cut the width {n} by {field}={requested}{butterflies}; {way}")
        return requested if self.size else n // requested

    def slots(self, op: Op) -> dict[str, Slot]:
        b = self.block_size(op)
        return {
            "boft_R": Slot((self.factors, self.rotation_size(op) // b, b, b)),
            "boft_s": Slot((1, op.out_features) if op.is_conv else (op.out_features, 1), fill=1.0),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        if self.scheme:
            return super().init(op, W, dtype, generator)
        specs = self.slots(op).items()
        values = {n: torch.empty(s.shape).normal_(s.fill, 0.1, generator=generator) for n, s in specs}
        return InitialValues({n: t.to(dtype) for n, t in values.items()})

    def has_apply(self, op: Op) -> bool:
        return op.kind == "embedding" or self.has_input(op)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        s = slots["boft_s"].flatten()
        wide = torch.promote_types(W.dtype, s.dtype)
        turned = super().weight(op, cast(W, wide), slots, scale)
        return cast(turned * s.reshape(-1, *[1] * (W.ndim - 1)), W.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        s = slots["boft_s"].flatten()
        out = super().apply(op, x, cast(y, torch.promote_types(y.dtype, s.dtype)), W, b, slots, scale)
        if b is None:
            return cast(out * op.along_out(s, y), y.dtype)
        b = op.along_out(b, y)
        return cast((out - b) * op.along_out(s, y) + b, y.dtype)

    def rotate(self, op: Op, v: Tensor, slots: Slots, transpose: bool = False) -> Tensor:
        b = self.block_size(op)
        R = to_solver_dtype(slots["boft_R"])
        Q = cayley_transform((R - R.mT) / 2)
        if self.training and self.dropout:
            Q = drop_to_identity(Q, self.dropout / self.factors)
        Q = cast(Q, v.dtype)
        order = range(self.factors) if transpose else reversed(range(self.factors))
        for i in order:
            v = multiply_blocks(_permute_halves(v, b, i, separate=False), Q[i].mT if transpose else Q[i])
            v = _permute_halves(v, b, i, separate=True)
        return v


def _permute_halves(v: Tensor, b: int, i: int, separate: bool) -> Tensor:
    """Permute the halves of blocks of ``b`` in every run of b 2^i entries of ``v`` (..., n).

    With ``separate`` the even halves of a run come first, and then the odd ones; without, the inverse.
    """
    if i == 0:
        return v
    inner = (2**i, 2) if separate else (2, 2**i)
    return v.unflatten(-1, (-1, *inner, b // 2)).transpose(-3, -2).flatten(-4)
