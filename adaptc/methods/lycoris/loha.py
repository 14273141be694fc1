"""LoHa: W' = W + (alpha / r) (A1 B1) * (A2 B2), product by entries (FedPara: Hyeon-Woo et al., arXiv 2108.06098).

Slots, in PEFT's shapes, for i = 1, 2: ``hada_wi_a`` (out, r) and ``hada_wi_b`` (r, in[*kernel]). A convolution with
``use_effective_conv2d`` and a kernel of more than one position has ``hada_ti`` (r, r, *kernel), ``hada_wi_a`` (r, out)
and ``hada_wi_b`` (r, in). There a one-dimensional kernel has 1 as a second size. ``in`` is that of one group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.methods.lycoris.lycoris_config import (
    Lycoris,
    LycorisConfig,
    apply_kernel_factor,
    detach_padding_row,
    fill_kaiming_uniform,
    fill_zeros,
    supports_row_lookup,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule


@dataclass
class LoHaConfig(LycorisConfig):
    """PEFT's ``LoHaConfig``: same names, same defaults. Raises ConfigError for illegal values.

    Example:
        >>> config = adaptc.LoHaConfig(r=8, alpha=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "LOHA"

    def method(self, name: str, kind: str) -> LoHa:
        return LoHa(**self.method_options(name))


class LoHaSizes(SizeRule):
    method: LoHa

    def minimal(self, op: Op) -> LoHa:
        return dataclasses.replace(self.method, r=2)


@dataclass(frozen=True)
class LoHa(Lycoris):
    """LoHa at one site, of any kind with a weight of two axes or more."""

    name: ClassVar[str] = "loha"
    sizes = LoHaSizes(rank_axes={"hada_w1_b": 0})

    def slots(self, op: Op) -> dict[str, Slot]:
        self.check_site(op)
        r, out, factored = self.r, op.shape[0], self.has_factored_kernel(op)
        slots: dict[str, Slot] = {}
        for i in "12":
            if factored:
                slots[f"hada_t{i}"] = Slot((r, r, *self.kernel_shape(op)), free=(0, 1))
                slots[f"hada_w{i}_a"] = Slot((r, out), free=(0,))
                slots[f"hada_w{i}_b"] = Slot((r, op.shape[1]), free=(0,))
            else:
                slots[f"hada_w{i}_a"] = Slot((out, r), free=(1,))
                slots[f"hada_w{i}_b"] = Slot((r, prod(op.shape[1:])), free=(0,))
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        last = fill_kaiming_uniform if self.scheme is False else fill_zeros
        how = {
            "hada_w1_a": fill_kaiming_uniform,
            "hada_w1_b": fill_kaiming_uniform,
            "hada_w2_a": fill_kaiming_uniform,
            "hada_w2_b": last,
        }
        if self.has_factored_kernel(op):
            how |= {"hada_t1": fill_kaiming_uniform, "hada_t2": fill_kaiming_uniform}
        return self.draw_initial(op, how, W, dtype, generator)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        (a1, b1), (a2, b2) = self._factors(op, slots)
        delta = (a1 @ b1) * (a2 @ b2) * scale
        rows = self.dropout_factors(op, delta, rescale=True)
        if rows is not None:
            delta = delta * rows.unsqueeze(-1)
        return cast(W + op.unmatrix(delta), W.dtype)

    def has_apply(self, op: Op) -> bool:
        # At other layers the elementwise product needs the whole matrix, which the form on the weight makes as well.
        return supports_row_lookup(op)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        (a1, b1), (a2, b2) = self._factors(op, slots)
        halves = [F.linear(F.embedding(x, b.t()), a) for a, b in ((a1, b1), (a2, b2))]
        delta = halves[0] * halves[1] * scale
        rows = self.dropout_factors(op, delta, rescale=True)
        if rows is not None:
            delta = delta * rows
        return cast(y + detach_padding_row(op, x, delta), y.dtype)

    def _factors(self, op: Op, slots: Slots) -> list[tuple[Tensor, Tensor]]:
        """Return the two pairs (A, B) of shapes (out, r) and (r, in*kernel)."""
        pairs = [(slots[f"hada_w{i}_a"], slots[f"hada_w{i}_b"]) for i in "12"]
        if not self.has_factored_kernel(op):
            return pairs
        return [
            (a.t(), apply_kernel_factor(slots[f"hada_t{i}"], b).flatten(1))
            for i, (a, b) in zip("12", pairs, strict=True)
        ]
