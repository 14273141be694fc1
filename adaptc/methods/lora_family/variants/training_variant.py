"""Define the base of LoRA's variants that differ in training alone.

In inference such a variant computes with LoRA's tensors. Its further slots are read by training, and by files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import TargetError
from adaptc.methods.lora_family.lora import Lora, LoraKernels
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.shared_slots import SharedSlots


class TrainingVariantKernels(LoraKernels):
    method: LoraTrainingVariant

    def why_missing(self, op: Op) -> str:
        if self.method.training:
            return f"in training {self.method.title} computes otherwise than LoRA, which the kernels are of"
        return super().why_missing(op)


@dataclass(frozen=True)
class LoraTrainingVariant(Lora):
    """LoRA with slots that only training reads. Subclasses say which, and what the layer computes in training."""

    #: the name in messages
    title: ClassVar[str] = ""
    #: the option of LoraConfig that chooses the variant
    option: ClassVar[str] = ""
    #: the fields that only the code of training depends on
    training_options: ClassVar[frozenset[str]] = frozenset()
    kernels = TrainingVariantKernels()
    sharing = SharedSlots()

    def training_slots(self, op: Op) -> dict[str, Slot]:
        """Return the slots beside LoRA's."""
        raise AssertionError(f"{type(self).__name__} must define training_slots()")

    def first_training_values(
        self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the first values of :meth:`training_slots`."""
        raise AssertionError(f"{type(self).__name__} must define first_training_values()")

    def trained_delta(self, op: Op, x: Tensor, slots: Slots) -> Tensor:
        """Return what B gives in training, before its bias and the scale; ``x`` is the adapter's input."""
        raise AssertionError(f"{type(self).__name__} must define trained_delta()")

    def structure(self) -> dict[str, Any]:
        found = super().structure()
        return found if self.training else {k: v for k, v in found.items() if k not in self.training_options}

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        return dataclasses.replace(new, training=self.training) if isinstance(new, LoraTrainingVariant) else new

    def slots(self, op: Op) -> dict[str, Slot]:
        if not op.callable or op.kind == "embedding" or len(op.shape) != 2:
            raise TargetError(
                f"{self.title} acts on the features that a matrix multiplies, and a consumer of kind {op.kind!r} with "
                f"a weight of shape {op.shape} has none: leave it out, or use LoRA ({self.option}=None)"
            )
        return {**super().slots(op), **self.training_slots(op)}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        plain = Lora(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Lora)})
        first = plain.init(op, W, dtype, generator)
        return InitialValues({**first.slots, **self.first_training_values(op, W, dtype, generator)}, first.base)

    def inside_multihead_attention(self) -> Lora:
        raise TargetError(f"{self.title} has no meaning in MultiheadAttention, as in PEFT; leave it out")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        if not self.training:
            return super().apply(op, x, y, W, b, slots, scale)
        delta = self.trained_delta(op, self.adapter_input(op, x, slots["lora_A.weight"].dtype), slots)
        if self.with_bias:
            delta = delta + op.along_out(slots["lora_B.bias"], delta)
        return cast(y + delta * scale, y.dtype)
