"""Define the base class of methods with virtual tokens: learned rows in front of a call's token embeddings.

The program gets input_ids, attention_mask, position_ids and labels that are longer by the number of virtual tokens. The
first rows of its embeddings are replaced. All sizes in the program follow, since they are read off its inputs. The
number of rows is the size of the slot ``prompt_embeddings``; zero rows are the identity.

A subclass defines its slots and the rows that they make (:meth:`VirtualTokens.prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.methods.prompt.virtual_token_method import PROMPT, InFront
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import Given
from adaptc.passes.protocol.method_hooks import Slot, Slots

__all__ = ["IGNORED", "PROMPT", "VirtualTokens"]

#: the label that losses ignore
IGNORED = -100


@dataclass(frozen=True)
class VirtualTokens(InFront):
    """A method with ``count`` virtual tokens, whose rows are those of the slot unless :meth:`prompt` is overridden."""

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT: self.rows_of(op.out_features)}

    def prompt(self, slots: Slots, given: Given) -> Tensor:
        """Return the rows: (count, width), or (batch, count, width) where rows of the batch differ."""
        return self.of_first(slots[PROMPT])

    def of_first(self, rows: Tensor) -> Tensor:
        """Return, of rows for all stacks, those of the first stack, which reads the caller's tokens."""
        return self.of_side(rows, 0)

    def of_side(self, rows: Tensor, side: int) -> Tensor:
        return rows if self.sides == 1 else rows.select(-3, side)

    def labels(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.padded(value, slots, IGNORED)

    def embedded(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.behind(self.prompt(slots, given), value)

    def behind(self, rows: Tensor, value: Tensor) -> Tensor:
        """Return embeddings ``value`` (batch, length, width) with the first ones replaced by ``rows``."""
        own = cast(rows, value.dtype).expand(value.shape[0], -1, -1)
        return torch.cat([own, value[:, rows.shape[-2] :]], 1)

    # -- files ---------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.divided(n, t) if n == PROMPT else t for n, t in found.items()}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: self.joined(t) if n == PROMPT else t for n, t in slots.items()}
