"""BEFT: a trained vector is added to the bias of a layer (Huang et al., arXiv 2509.15974).

    W' = W,  b' = b + beta

Slot ``beft_bias``: beta, in PEFT's shape (1, out). A layer without a bias gets beta as its bias, and so does the merged
layer: PEFT refuses that merge. PEFT has linear layers alone, and here convolutions are adapted as well. A weight that
is read without a bias, such as an embedding's, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat

SLOT = "beft_bias"


@dataclass
class BeftConfig(TargetedConfig):
    """PEFT's ``BeftConfig``: same names, same defaults.

    The default targets are those of PEFT's table, the value projections.

    Attributes:
        init_weights: whether the vectors start at zero; False starts from normal random numbers.

    Example:
        >>> config = adaptc.BeftConfig(target_modules=["v_proj"])
    """

    peft_type: ClassVar[str] = "BEFT"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "target_parameters": "the bias of a layer is adapted and not its weight; name the layer in target_modules",
    }

    init_weights: bool = True

    def method(self, name: str, kind: str) -> Beft:
        return Beft(self.init_weights)


@dataclass(frozen=True)
class Beft(Method):
    """BEFT at one site. ``scheme`` False: first values are normal random numbers."""

    name: ClassVar[str] = "beft"
    files = FileFormat(names=(SLOT,), summed=SLOT)

    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        if not op.callable or op.kind == "embedding":
            raise TargetError(
                f"BEFT adapts the bias of a layer, and a consumer of kind {op.kind!r} takes none; leave it out"
            )
        return {SLOT: Slot((1, op.out_features))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        # PEFT draws even where zeros follow, so that later layers see the same generator.
        drawn = torch.randn(self.slots(op)[SLOT].shape, generator=generator, device=source)
        value = torch.zeros_like(drawn) if self.scheme else drawn
        return InitialValues({SLOT: value.to(W.device, dtype)})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return W

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        beta = slots[SLOT].reshape(-1)
        return beta if b is None else cast(b + beta, b.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        return cast(y + op.along_out(slots[SLOT].reshape(-1), y), y.dtype)
