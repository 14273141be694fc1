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

from adaptc.methods.prompt.virtual_token_method import PROMPT_EMBEDDINGS, VirtualTokenFiles, VirtualTokenMethod
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import ExtraValues
from adaptc.passes.protocol.parts.method_part import Slot, Slots

__all__ = ["IGNORE_INDEX", "PROMPT_EMBEDDINGS", "VirtualTokens"]

#: the label that losses ignore
IGNORE_INDEX = -100


class VirtualTokensFiles(VirtualTokenFiles):
    method: VirtualTokens

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.method.split_stacks(n, t) if n == PROMPT_EMBEDDINGS else t for n, t in found.items()}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: self.method.join_stacks(t) if n == PROMPT_EMBEDDINGS else t for n, t in slots.items()}


@dataclass(frozen=True)
class VirtualTokens(VirtualTokenMethod):
    """A method with ``count`` virtual tokens, whose rows are those of the slot unless :meth:`prompt` is overridden.

    Attributes:
        count: the number of virtual tokens.
        first: the scheme of the first values, in a form of the subclass's own.
        sides: the number of stacks with rows of their own: 2 for an encoder and a decoder.

    Example:
        >>> method = adaptc.methods.VirtualTokens(count=3)
        >>> method.prompt({"prompt_embeddings": torch.randn(3, 8)}, {}).shape
        torch.Size([3, 8])
    """

    files = VirtualTokensFiles(names=(PROMPT_EMBEDDINGS,))

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT_EMBEDDINGS: self.rows_slot(op.out_features)}

    def prompt(self, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the rows of the virtual tokens.

        Args:
            slots: the slot tensors by name.
            given: the inputs that the method adds to the program, by name.

        Returns:
            (count, width), or (batch, count, width) where rows of the batch differ.
        """
        return self.first_stack_rows(slots[PROMPT_EMBEDDINGS])

    def first_stack_rows(self, rows: Tensor) -> Tensor:
        """Return, of rows for all stacks, those of the first stack, which reads the caller's tokens."""
        return self.stack_rows(rows, 0)

    def stack_rows(self, rows: Tensor, stack: int) -> Tensor:
        return rows if self.sides == 1 else rows.select(-3, stack)

    def labels(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.pad_front(value, slots, IGNORE_INDEX)

    def inputs_embeds(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.overwrite_first_rows(self.prompt(slots, given), value)

    def overwrite_first_rows(self, rows: Tensor, value: Tensor) -> Tensor:
        """Return embeddings ``value`` (batch, length, width) with the first ones replaced by ``rows``."""
        own = cast(rows, value.dtype).expand(value.shape[0], -1, -1)
        return torch.cat([own, value[:, rows.shape[-2] :]], 1)

    # -- files ---------------------------------------------------------------------------------------------------------
