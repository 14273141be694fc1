"""Virtual tokens: learned rows in front of the embeddings of a call's tokens, whatever makes the rows.

The program is given tokens, mask, positions and labels that are longer by as many, and the first rows of its embeddings
are replaced. Every size in it follows, since sizes are read off inputs, and so does the number of rows: it is the size
of the slot ``prompt_embeddings``. No rows at all are the identity.

A method of this kind says what its slots are and what rows they make (:meth:`VirtualTokens.prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.methods._in_front import PROMPT, InFront
from adaptc.passes.ir.coefficients import Given
from adaptc.passes.ir.method_hooks import Slot, Slots
from adaptc.passes.ir.ops import Op, cast

__all__ = ["IGNORED", "PROMPT", "VirtualTokens"]

#: what losses leave out
IGNORED = -100


@dataclass(frozen=True)
class VirtualTokens(InFront):
    """``count``: how many rows. They are those of the slot, unless :meth:`prompt` is overridden."""

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT: self.rows_of(op.out_features)}

    def prompt(self, slots: Slots, given: Given) -> Tensor:
        """The rows: (count, width), or (batch, count, width) where they differ."""
        return self.of_first(slots[PROMPT])

    def of_first(self, rows: Tensor) -> Tensor:
        """Of rows for all stacks those of the first one, which reads what a caller gives."""
        return self.of_side(rows, 0)

    def of_side(self, rows: Tensor, side: int) -> Tensor:
        return rows if self.sides == 1 else rows.select(-3, side)

    def labels(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.padded(value, slots, IGNORED)

    def embedded(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.behind(self.prompt(slots, given), value)

    def behind(self, rows: Tensor, value: Tensor) -> Tensor:
        """Embeddings of which the first are these rows."""
        own = cast(rows, value.dtype).expand(value.shape[0], -1, -1)
        return torch.cat([own, value[:, rows.shape[-2] :]], 1)

    # -- files ---------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.divided(n, t) if n == PROMPT else t for n, t in found.items()}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: self.joined(t) if n == PROMPT else t for n, t in slots.items()}
