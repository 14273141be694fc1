"""Virtual tokens: learned rows in front of the embeddings of a call's tokens, whatever makes the rows.

The program is given tokens, mask, positions and labels that are longer by as many, and the first rows of its embeddings
are replaced. Every size in it follows, since sizes are read off inputs, and so does the number of rows: it is the size
of the slot ``prompt_embeddings``. No rows at all are the identity.

A method of this kind says what its slots are and what rows they make (:meth:`VirtualTokens.prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.ir.method_hooks import Slot, Slots
from adaptc.passes.ir.ops import Op, cast
from adaptc.passes.ir.program_method import Given, ProgramMethod

PROMPT = "prompt_embeddings"
#: what losses leave out
IGNORED = -100


@dataclass(frozen=True)
class VirtualTokens(ProgramMethod):
    """``count``: how many rows. They are those of the slot, unless :meth:`prompt` is overridden."""

    swappable: ClassVar[frozenset[str]] = frozenset({"count", "first", "training"})
    #: slot -> what PEFT's module of the prompt calls it
    modules: ClassVar[Mapping[str, str]] = {PROMPT: "embedding.weight"}
    file_names: ClassVar[tuple[str, ...]] = (PROMPT,)

    count: int = 0
    #: how first values are made; what it holds is up to the method
    first: tuple[Any, ...] = ()

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT: Slot((self.count, op.out_features), free=(0,))}

    def prompt(self, slots: Slots, given: Given) -> Tensor:
        """The rows: (count, width), or (batch, count, width) where they differ."""
        return slots[PROMPT]

    # -- places --------------------------------------------------------------------------------------------------------

    def lengthens(self, slots: Slots) -> int:
        return slots[PROMPT].shape[0]

    def tokens(self, value: Tensor, slots: Slots, given: Given, plain: int) -> Tensor:
        return _in_front(value, slots, plain)

    def attended(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return _in_front(value, slots, 1)

    def positions(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        n = slots[PROMPT].shape[0]
        own = torch.arange(n, dtype=value.dtype, device=value.device).expand(value.shape[0], -1)
        return torch.cat([own, value + n], 1)

    def segments(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return _in_front(value, slots, 0)

    def labels(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return _in_front(value, slots, IGNORED)

    def embedded(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        rows = cast(self.prompt(slots, given), value.dtype).expand(value.shape[0], -1, -1)
        return torch.cat([rows, value[:, slots[PROMPT].shape[0] :]], 1)

    # -- sizes and names -----------------------------------------------------------------------------------------------

    def rank(self) -> int:
        return self.count

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        return replace(self, count=slots[PROMPT].shape[0]) if PROMPT in slots else self

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return replace(self, count=0).filled(op, W, dtype)

    def clash(self, other: Any) -> str:
        return "the first tokens" if isinstance(other, VirtualTokens) else ""

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return f"prompt_encoder.{adapter}.{self.modules.get(slot, slot)}"


def _in_front(value: Tensor, slots: Slots, fill: int) -> Tensor:
    return F.pad(value, (slots[PROMPT].shape[0], 0), value=fill)
