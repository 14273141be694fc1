"""RoAd: pairs of outputs are turned and scaled in their plane (Liao and Monz, arXiv 2409.00119).

    W' = R W,  b' = R b,  R = 2x2 blocks on rows j and j + group/2 of each group of rows:

    [ alpha1 cos(theta1)   -alpha2 sin(theta2) ]
    [ alpha3 sin(theta3)    alpha4 cos(theta4) ]

A block of road_1 has one angle and one scale, road_2 one of each per row, road_4 four of each. The slots
``road_theta`` and ``road_alpha`` are each (out/2,), (out,) or (2 out,), group by group; for road_4 a group has the
entries of its cosines before those of its sines. Rows are output channels: the width of an embedding, the channels of a
convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_matrix
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots

THETA, ALPHA = "road_theta", "road_alpha"
#: variant -> the length of each slot per pair of rows
ENTRIES_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass
class RoadConfig(TargetedConfig):
    """PEFT's ``RoadConfig``: same names, same defaults.

    Attributes:
        variant: "road_1", "road_2" or "road_4", which have one, two or four parameters for each pair of outputs.
        group_size: the number of outputs in which pairs are formed.

    Example:
        >>> config = adaptc.RoadConfig(variant="road_1", target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "ROAD"

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ENTRIES_PER_PAIR:
            raise ConfigError(f"RoadConfig.variant must be one of {', '.join(ENTRIES_PER_PAIR)}, got {self.variant!r}")
        size = self.group_size
        if size <= 0 or size % 2:
            raise ConfigError(f"RoadConfig.group_size must be a positive even number, got {size!r}")

    def method(self, name: str, kind: str) -> Road:
        return Road(self.variant, self.group_size, self.init_weights)


@dataclass(frozen=True)
class Road(Method):
    """RoAd at one site. ``scheme`` False: random first values around the identity."""

    name: ClassVar[str] = "road"

    variant: str = "road_1"
    group_size: int = 64
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("RoAd", op)
        rows = op.shape[0]
        if rows % self.group_size:
            fitting = [n for n in range(2, min(rows, 2 * self.group_size) + 1, 2) if rows % n == 0]
            hint = f"group_size={fitting[-1]} fits" if fitting else "an odd number cannot be paired: leave it out"
            raise TargetError(
                f"RoAd needs outputs in whole groups of group_size={self.group_size}, and there are {rows}; {hint}"
            )
        size = rows * ENTRIES_PER_PAIR[self.variant] // 2
        return {THETA: Slot((size,)), ALPHA: Slot((size,), fill=1.0)}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        if self.scheme:
            return super().init(op, W, dtype, generator)
        source = torch.device("cpu") if generator is None else generator.device
        values = {}
        for name, slot in self.slots(op).items():
            drawn = torch.empty(slot.shape, device=source).normal_(slot.fill, 0.5, generator=generator)
            values[name] = drawn.to(W.device, dtype)
        return InitialValues(values)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        # Where a RoAd group spans groups of the convolution, the new weight reads all inputs, so it must be dense.
        apart = op.out_features // op.groups % self.group_size == 0
        return self._rotate(W if apart else op.dense(W), 0, slots)

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        return None if b is None else self._rotate(b, 0, slots)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        return self._rotate(y, y.ndim - 1 - len(op.kernel), slots)

    def _rotate(self, t: Tensor, axis: int, slots: Slots) -> Tensor:
        """Return R t, with R acting along ``axis``, whose size is the number of outputs."""
        first, second = (c.reshape(-1, *[1] * (t.ndim - 1 - axis)) for c in self._rotation_factors(slots))
        upper, lower = t.unflatten(axis, (-1, 2, self.group_size // 2)).unbind(axis + 1)
        turned = torch.stack((-lower, upper), axis + 1).flatten(axis, axis + 2)
        return cast(t * first + turned * second, t.dtype)

    def _rotation_factors(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return the factors of each output and of its partner in the result, (out,) each."""
        half, theta, alpha = self.group_size // 2, slots[THETA], slots[ALPHA]
        if self.variant == "road_4":
            (theta, other), (alpha, scale) = (v.reshape(-1, 2, 2 * half).unbind(1) for v in (theta, alpha))
        else:
            if self.variant == "road_1":
                theta, alpha = (v.reshape(-1, 1, half).repeat(1, 2, 1) for v in (theta, alpha))
            other, scale = theta, alpha
        return (alpha * theta.cos()).reshape(-1), (scale * other.sin()).reshape(-1)
