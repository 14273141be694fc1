"""DoRA: the rows of W + s B A, turned by LoRA, with lengths trained apart (Liu et al., arXiv 2402.09353).

W' = g (W + s B A) row by row, with g = m / |W + s B A|; the length in the denominator gets no gradient. Where other
adapters changed W before, that length is computed from the base weight, as in PEFT.

Slots: LoRA's, and ``lora_magnitude_vector``, the lengths m. Its shape is (out,), at embeddings (width,), at
convolutions (1, out, 1...), at stacked experts (experts, out). A row of a convolution is all of the weight for one
output channel. Rows of length zero have g = 1: they act as in LoRA until they have a direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.methods._shared.option_checks import applies_dropout, prepare_adapter_input
from adaptc.methods.lora_family.lora import LORA_NAMES, Lora, LoraFiles, LoraKernels
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.shared_slots import SharedSlots

MAGNITUDE = "lora_magnitude_vector"


class DoraFiles(LoraFiles):
    method: Dora

    def low_rank(self, found: Slots) -> None:
        return None  # its change depends on the lengths of the base weight's rows

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        # PEFT holds the vector in a module of its own, and leaves that out of its files.
        return super().fqn(place, f"{slot}.weight" if slot == MAGNITUDE else slot, adapter)


class DoraKernels(LoraKernels):
    method: Dora

    def apply(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        from adaptc.kernels import dora_epilogue, dora_norm, lora_down

        A, B, _ = slots.values()
        gain = self.method.gain(slots, dora_norm(W, A, B, scale))
        rows = x.reshape(-1, x.shape[-1])
        y = dora_epilogue(F.linear(rows, W), lora_down(rows, A), B, gain, scale, b)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA at one site. In training ``dropout`` acts on the input of everything added to the layer's own output."""

    name: ClassVar[str] = "dora"
    takes_complex: ClassVar[bool] = False
    files = DoraFiles(names=(*LORA_NAMES, MAGNITUDE))
    kernels = DoraKernels()
    sharing = SharedSlots()

    def slots(self, op: Op) -> dict[str, Slot]:
        shape = (op.experts,) if op.experts else (1,) if op.is_conv else ()
        ones = (1,) * len(op.kernel) if op.is_conv else ()
        return {**super().slots(op), MAGNITUDE: Slot((*shape, op.out_features, *ones))}

    def with_other_slots(self, op: Op, W: Tensor, first: InitialValues) -> InitialValues:
        base = W if first.base is None else first.base
        return InitialValues(self._with_magnitudes(op, base, first.slots), first.base)

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._with_magnitudes(op, W, super().identity(op, W, dtype))

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        # Other adapters may have changed the weight, so no finite length means no change: infinity stands for g = 1.
        values = super().identity(op, W, dtype)
        return {**values, MAGNITUDE: torch.full_like(values[MAGNITUDE], torch.inf)}

    def inside_multihead_attention(self) -> Dora:
        return self  # PEFT has no DoRA in MultiheadAttention, and so no files in which it is applied twice

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        full = self._weight_plus_delta(op, W, slots, scale)
        return self._apply_gain(full, W, slots, full.detach(), op)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        constant = {n: t.detach() for n, t in slots.items()}
        measured = self._weight_plus_delta(op, base.detach(), constant, scale)
        return self._apply_gain(self._weight_plus_delta(op, W, slots, scale), W, slots, measured, op)

    def _apply_gain(self, full: Tensor, W: Tensor, slots: Slots, norm_weight: Tensor, op: Op) -> Tensor:
        gain = self.gain(slots, _row_norms(op, norm_weight))
        return cast(full * gain.reshape(*gain.shape, *[1] * (full.ndim - gain.ndim)), W.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B = self._factors(op, slots)
        x = prepare_adapter_input(self, op, x, A.dtype)
        if applies_dropout(self, op):
            base = op(x, cast(W, x.dtype))
        else:
            base = y if b is None else y - op.along_out(b, y)
        constant = {n: t.detach() for n, t in slots.items()}
        lengths = _row_norms(op, self._weight_plus_delta(op, W.detach(), constant, scale))
        gain = op.along_out(self.gain(slots, lengths), y)
        return cast(y + (gain - 1) * base + gain * (op.down_up(x, A, B) * scale), y.dtype)

    def _weight_plus_delta(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """Return W + s B A, in the wider dtype of the two, dense where a convolution has groups."""
        A, B = self._factors(op, slots)
        wide = torch.promote_types(W.dtype, A.dtype)
        return cast(op.dense(W), wide) + op.product(cast(A, wide), cast(B, wide)) * scale

    def gain(self, slots: Slots, lengths: Tensor) -> Tensor:
        # Rounded to the magnitudes' dtype, so that lengths that did not change give a gain of exactly one.
        magnitude = slots[MAGNITUDE].reshape(lengths.shape)
        lengths = cast(cast(lengths, magnitude.dtype), lengths.dtype)
        none = lengths == 0
        gain = cast(magnitude, lengths.dtype) / lengths.masked_fill(none, 1)
        return gain.masked_fill(none | magnitude.isinf(), 1)

    def _with_magnitudes(self, op: Op, W: Tensor, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        spec = self.slots(op)[MAGNITUDE]
        dtype = next(iter(slots.values())).dtype
        lengths = _row_norms(op, self._weight_plus_delta(op, W.detach(), slots, self.scale(op)))
        return {**slots, MAGNITUDE: lengths.to(dtype).reshape(spec.shape)}


def _row_norms(op: Op, full: Tensor) -> Tensor:
    """Return the length of each row, in float32 or wider: (out,), or (experts, out) for stacked experts."""
    high = torch.promote_types(full.dtype, torch.float32)
    return torch.linalg.vector_norm(full, dim=tuple(range(2 if op.experts else 1, full.ndim)), dtype=high)
