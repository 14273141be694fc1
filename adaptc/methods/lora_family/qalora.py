"""QA-LoRA: LoRA whose input is pooled over groups of columns (Xu et al., arXiv 2309.14717).

W' = W + s B (A P). The input's n features form n / g groups of ``group_size`` g. P takes the mean of each group, times
the number of groups, so that A has a column for each group. All columns of a group change by the same amount, as a
zero point that they share in a quantised weight does.

Slots: LoRA's, with ``lora_A.weight`` (r, in / g), for E stacked experts (r*E, in / g). Sites are matrices that multiply
features: linear layers, experts and parameters with two axes. PEFT has it at GPTQ's linear layers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptc.errors import TargetError
from adaptc.methods.lora_family.lora import LORA_NAMES, Lora, LoraBank, LoraFiles, LoraKernels
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.low_rank_rows import low_rank_rows
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.passes.protocol.parts.shared_slots import SharedSlots


class QaLoraFiles(LoraFiles):
    method: QaLora

    def low_rank(self, found: Slots) -> LowRank | None:
        change = super().low_rank(found)
        return None if change is None else replace(change, down=self.method.unpool(change.down))

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        # A combination of adapters is plain LoRA, whose A has a column for each feature.
        A = like["lora_A.weight"]
        full = A.new_empty((*A.shape[:-1], change.down.shape[-1]), device="meta")
        return super().with_low_rank(change, {**like, "lora_A.weight": full})


class QaLoraBank(LoraBank):
    method: QaLora

    def apply_fused(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, c: Tensor) -> Tensor | None:
        if op.kind not in ("linear", "addmm"):
            return None
        A, B = slots.values()
        return low_rank_rows(self.method.pool(op.cast_input(x, A.dtype)), y, A, B, scale, c)  # type: ignore[arg-type]

    def apply_kernel(
        self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, starts: Tensor, c: Tensor
    ) -> Tensor:
        return super().apply_kernel(op, self.method.pool(x), y, slots, scale, starts, c)

    def expert_factors(self, op: Op, slots: Slots) -> None:
        return None  # its A multiplies pooled features


class QaLoraKernels(LoraKernels):
    method: QaLora

    def why_missing(self, op: Op) -> str:
        return "the kernels read a layer's input as it is, and this adapter pools it"


@dataclass(frozen=True)
class QaLora(Lora):
    """QA-LoRA at one site. ``group_size``: the number of input features that are pooled into one."""

    name: ClassVar[str] = "qalora"
    files = QaLoraFiles(names=LORA_NAMES)
    bank = QaLoraBank()
    kernels = QaLoraKernels()
    sharing = SharedSlots()

    group_size: int = 16

    def slots(self, op: Op) -> dict[str, Slot]:
        features = self._check_site(op)
        slots = super().slots(op)
        rows = slots["lora_A.weight"].shape[0]
        return {**slots, "lora_A.weight": Slot((rows, features // self.group_size), free=(0,))}

    def _check_site(self, op: Op) -> int:
        """Return the number of input features. Raises TargetError where they have no groups."""
        if op.kind == "embedding" or len(op.shape) != (3 if op.experts else 2):
            raise TargetError(
                f"QA-LoRA pools the input features of a matrix, and a consumer of kind {op.kind!r} with a weight of "
                f"shape {op.shape} has none: leave it out, or use LoRA (use_qalora=False)"
            )
        features, size = op.shape[-1], self.group_size
        if features % size:
            fitting = [d for d in range(1, features + 1) if features % d == 0]
            nearest = min(fitting, key=lambda d: abs(d - size))
            raise TargetError(
                f"QA-LoRA divides the input features into groups of qalora_group_size={size}, and the layer has "
                f"{features} of them; qalora_group_size={nearest} fits"
            )
        return features

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        # PEFT draws LoRA's tensors first, and then a smaller A in place of theirs.
        plain = Lora(**{f.name: getattr(self, f.name) for f in fields(Lora)})
        values = plain.init(op, W, dtype, generator).slots
        device = torch.device("cpu") if generator is None else generator.device
        A = torch.empty(self.slots(op)["lora_A.weight"].shape, dtype=torch.get_default_dtype(), device=device)
        if self.scheme == "gaussian":
            nn.init.normal_(A, std=1.0 / self.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
        return InitialValues({**values, "lora_A.weight": A.to(device=W.device, dtype=dtype)})

    def inside_multihead_attention(self) -> QaLora:
        return self  # PEFT has no QA-LoRA in MultiheadAttention, and so no files in which it is applied twice

    def pool(self, x: Tensor) -> Tensor:
        """Return the groups of the features ``x`` (..., in), as (..., in / group_size)."""
        groups = x.shape[-1] // self.group_size
        return x.unflatten(-1, (groups, self.group_size)).mean(-1) * groups

    def unpool(self, A: Tensor) -> Tensor:
        """Return the matrix (..., in) that does to features what ``A`` (..., in / group_size) does to their groups."""
        return A.repeat_interleave(self.group_size, -1) * (A.shape[-1] / self.group_size)

    def adapter_input(self, op: Op, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.pool(super().adapter_input(op, x, dtype))

    def weight_factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        A, B = super().weight_factors(op, slots)
        return self.unpool(A), B
